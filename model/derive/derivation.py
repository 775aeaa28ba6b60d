"""Derivation of a draft from a config: a tiny twin that builds and runs, its axes probed, its forward pass
watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError, in_one_line, near_matches
from outgrow.model.build import to_hf_config
from outgrow.model.composite import flat
from outgrow.model.derive.axes import Axes, Keys
from outgrow.model.derive.probe import build, shapes
from outgrow.model.derive.roles import Draft
from outgrow.model.derive.shrink import (
    HEAD,
    MAX_PARAMETERS,
    kept_layers,
    layer_kinds,
    place_tokens,
    shrunken,
    small_layers,
    stand_ins,
    two_of_each_kind,
)
from outgrow.model.derive.unfit import Unfit
from outgrow.model.derive.watch import sightings
from outgrow.model.family import Config
from outgrow.model.keys import DEPTH_KEYS, HEAD_KEYS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROWS, LENGTH = 2, 12  # of random tokens


def library_knows(config: Config) -> bool:
    """Check whether transformers has a causal language model of this config's type, alone or beside other
    towers.
    """
    return config.get("model_type") in _causal_types()


def _causal_types() -> set[str]:
    """The model types of which transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    return {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}


def derive(config: Config) -> Draft:
    """Draft the schema of the family of `config`; no code but the library's own is run.

    Raises:
        UserError: the library has no causal language model of this type, or its class does not build or run
            as a tiny twin.
    """
    if not library_knows(config):
        near = near_matches(config.get("model_type"), _causal_types())
        question = f"; {near}" if near else ""
        raise UserError(f"transformers has no causal language model of that type{question}")
    complete, attribute_map = _completed(config)
    keys = Keys.of(complete, attribute_map)
    depth = complete[keys.layers]
    layers = kept_layers(complete, depth)
    tiny = shrunken(complete, keys.layers, layers)
    stands = stand_ins(layer_kinds(complete, depth), layers)
    faults: list[Unfit] = []
    for candidate in _twins(tiny, keys):
        try:
            twin = whole_config(candidate)
            blank = build(twin)
        except Unfit as fault:
            faults.append(fault)
            continue
        try:
            return replace(_draft(keys, twin, blank), stands=stands)
        except Unfit as fault:
            faults.insert(0, fault)  # it came further
    build(complete)  # where it is the config itself that the class refuses, its words are the ones to quote
    raise faults[0]


def tiny_configs(config: Config) -> Iterator[dict[str, Any]]:
    """Yield configs of tiny twins, the likeliest first; whether the class builds from one has to be tried.

    Raises:
        UserError: the config has no hidden size, layer count or vocabulary under a known name, or too many
            kinds of layers.
    """
    complete, attribute_map = _completed(config)
    keys = Keys.of(complete, attribute_map)
    depth = complete[keys.layers]
    numbers = kept_layers(complete, depth)
    tiny = shrunken(complete, keys.layers, numbers)
    yield from _twins(tiny, keys)
    if twice := two_of_each_kind(complete, depth):
        yield from _twins(shrunken(complete, keys.layers, twice), keys)
    if layers := small_layers(tiny):
        yield from _twins(tiny | layers, keys)


def _twins(tiny: Config, keys: Keys) -> Iterator[dict[str, Any]]:
    """Yield the tiny config, then with what some classes insist on.

    That is a key-value head for each query head (no grouped-query attention), a head dim of hidden size /
    heads.
    """
    every_head = {}
    if keys.kv and keys.heads:
        every_head[keys.kv] = tiny[keys.heads]
    divided = {key: HEAD for key in HEAD_KEYS if key in tiny}
    for changes in ({}, every_head, divided, every_head | divided):
        yield {**tiny, **changes}


def check_size(blank: PreTrainedModel) -> None:
    """Check on the meta device that a tiny twin is tiny.

    Raises:
        Unfit: it is not.
    """
    tensors = chain(blank.parameters(), blank.buffers())
    count = sum(tensor.numel() for tensor in tensors)
    if count > MAX_PARAMETERS:
        raise Unfit(
            f"a tiny twin of it still has {count:,} parameters, so some size of its config was not recognised"
        )


def _draft(keys: Keys, tiny: dict[str, Any], blank: PreTrainedModel) -> Draft:
    """Draft the schema from a tiny config, of which `blank` is the model on the meta device."""
    check_size(blank)
    axes = Axes(keys, tiny, shapes(tiny))
    model = build(tiny, "cpu")
    tokens = random_tokens(tiny, keys, seed=0)
    tensors = sightings(model, tokens)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def weight_of(module: Any) -> str | None:
        weight = getattr(module, "weight", None)
        return names.get(id(weight))

    head = weight_of(model.get_output_embeddings())
    embedding = weight_of(model.get_input_embeddings())
    return Draft(axes, tensors, head, embedding)


def random_tokens(tiny: Config, keys: Keys, seed: int) -> torch.Tensor:
    """Draw tokens (row, position) of a tiny config, none of which holds the place of anything but text."""
    import torch

    places = len(place_tokens(tiny))
    words = tiny[keys.vocab] - places
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(words, (ROWS, LENGTH), generator=numbers)


def whole_config(config: Config) -> dict[str, Any]:
    """Complete a config with everything that the library's own class fills in.

    Raises:
        Unfit: the class refuses it.
    """
    return _completed(config)[0]


def _completed(config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """Complete a config by the library's class, and look up how that class spells standard names."""
    try:
        hf_config = to_hf_config(config)
        complete = flat(hf_config.to_dict())
        attribute_map = dict(hf_config.get_text_config(decoder=True).attribute_map)
    except UserError as fault:
        raise Unfit(str(fault)) from None
    except Exception as fault:  # the library's classes raise every kind
        kind = config.get("model_type")
        reason = in_one_line(fault)
        raise Unfit(f"transformers' config class for {kind!r} refuses this config: {reason}") from None
    head_dim = _head_dim(complete, attribute_map)
    count = _layer_count(complete, hf_config)
    return complete | head_dim | count, attribute_map


def _layer_count(config: Config, hf_config: Any) -> dict[str, int]:
    """Fill in the number of layers of a class that counts a list of them (Nemotron-H) and does not take the
    key.
    """
    count = getattr(hf_config, "num_hidden_layers", None)
    own = type(hf_config).__dict__.get("num_hidden_layers")
    counted = isinstance(own, property)
    is_named = any(key in config for key in DEPTH_KEYS)
    if is_named or not counted or type(count) is not int:
        return {}
    return {"num_hidden_layers": count}


def _head_dim(config: Config, attribute_map: Mapping[str, str]) -> dict[str, int]:
    """Fill in the head dim that classes take where the config has none and the heads do not divide the hidden
    size.
    """
    names = ("hidden_size", "num_attention_heads")
    keys = [attribute_map.get(name, name) for name in names]
    hidden, heads = map(config.get, keys)
    is_named = any(config.get(key) for key in HEAD_KEYS)
    if is_named or type(hidden) is not int or type(heads) is not int:
        return {}
    divides = not heads or hidden % heads == 0
    return {} if divides else {"head_dim": hidden // heads}
