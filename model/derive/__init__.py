"""Deriving a schema: what a family's own class, built tiny and watched, shows of the roles of its tensors.

Nothing here is proof: a draft is believed only after `growth.rehearse` has grown a tiny model by it and found the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError
from outgrow.model.build import to_hf_config
from outgrow.model.composite import flat
from outgrow.model.depth_only import DEPTH_KEYS
from outgrow.model.derive.axes import Axes, Keys
from outgrow.model.derive.probe import build, shapes, sightings
from outgrow.model.derive.roles import Draft
from outgrow.model.derive.shrink import (
    HEAD,
    HEAD_KEYS,
    MAX_PARAMETERS,
    kept_layers,
    layer_kinds,
    place_tokens,
    shrunken,
    small_layers,
    stand_ins,
    two_of_each_kind,
)
from outgrow.model.family import Config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROWS, LENGTH = 2, 12  # of random tokens


def library_knows(config: Config) -> bool:
    """Whether transformers itself has a causal language model of this config's type, alone or with other towers beside it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys()


def derive(config: Config) -> Draft:
    """A draft of the schema of the family of `config`, which goes through the library's own config class and nothing else of a stranger's.

    Raises:
        UserError: the library has no causal language model of this type, or its class does not build or run as a tiny twin.
    """
    if not library_knows(config):
        raise UserError("transformers has no causal language model of that type")
    whole, attribute_map = _whole(config)
    keys = Keys.of(whole, attribute_map)
    kept = kept_layers(whole, whole[keys.layers])
    tiny = shrunken(whole, keys.layers, kept)
    stands = stand_ins(layer_kinds(whole, whole[keys.layers]), kept)
    faults = []
    for twin in _twins(tiny, keys):
        try:
            blank = build(twin := whole_config(twin))
        except UserError as fault:
            faults.append(fault)
            continue
        try:
            return replace(_draft(keys, twin, blank), stands=stands)
        except UserError as fault:
            faults.insert(0, fault)  # it came further
    build(whole)  # what the class says of the config itself
    raise faults[0]


def tiny_configs(config: Config) -> Iterator[dict[str, Any]]:
    """Configs of tiny twins, the likeliest first; whether the class builds from one has to be tried.

    Raises:
        UserError: the config has no hidden size, layer count or vocabulary under a known name, or too many kinds of layers.
    """
    whole, attribute_map = _whole(config)
    keys = Keys.of(whole, attribute_map)
    tiny = shrunken(whole, keys.layers, kept_layers(whole, whole[keys.layers]))
    yield from _twins(tiny, keys)
    if twice := two_of_each_kind(whole, whole[keys.layers]):
        yield from _twins(shrunken(whole, keys.layers, twice), keys)
    if layers := small_layers(tiny):
        yield from _twins(tiny | layers, keys)


def _twins(tiny: Config, keys: Keys) -> Iterator[dict[str, Any]]:
    """The tiny config, then with what some classes insist on: a key-value head for each query head, a head dim of hidden size / heads."""
    every_head = {keys.kv: tiny[keys.heads]} if keys.kv and keys.heads else {}
    divided = {key: HEAD for key in HEAD_KEYS if key in tiny}
    for changes in ({}, every_head, divided, every_head | divided):
        yield {**tiny, **changes}


def _draft(keys: Keys, tiny: dict[str, Any], blank: PreTrainedModel) -> Draft:
    if (count := sum(tensor.numel() for tensor in (*blank.parameters(), *blank.buffers()))) > MAX_PARAMETERS:
        raise UserError(f"a tiny twin of it still has {count:,} parameters, so some size of its config was not recognised")
    axes = Axes(keys, tiny, shapes(tiny))
    model = build(tiny, "cpu")
    seen = sightings(model, random_tokens(tiny, keys, seed=0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head, embedding = (
        None if module is None else names.get(id(getattr(module, "weight", None)))
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    return Draft(axes, seen, head, embedding)


def random_tokens(tiny: Config, keys: Keys, seed: int) -> torch.Tensor:
    """Tokens (row, position) of a tiny config, none of which holds the place of anything but text."""
    import torch

    words = tiny[keys.vocab] - len(place_tokens(tiny))
    return torch.randint(words, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def whole_config(config: Config) -> dict[str, Any]:
    """A config with everything that the library's own class makes of it.

    Raises:
        UserError: the class refuses it.
    """
    return _whole(config)[0]


def _whole(config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """A config with everything that the library's class makes of it, and how that class spells standard names."""
    try:
        made = to_hf_config(config)
        whole, attribute_map = flat(made.to_dict()), dict(made.get_text_config(decoder=True).attribute_map)
    except UserError:
        raise
    except Exception as fault:  # the library's classes raise every kind
        reason = " ".join(str(fault).split())[:200]
        raise UserError(f"transformers' config class for {config.get('model_type')!r} refuses this config: {reason}") from None
    return whole | _head_dim(whole, attribute_map) | _layer_count(whole, made), attribute_map


def _layer_count(whole: Config, made: Any) -> dict[str, int]:
    """The number of layers of a class that counts a list of them (Nemotron-H), under the key that it passes over in a config."""
    count = getattr(made, "num_hidden_layers", None)
    known = any(key in whole for key in DEPTH_KEYS) or not isinstance(type(made).__dict__.get("num_hidden_layers"), property)
    return {} if known or type(count) is not int else {"num_hidden_layers": count}


def _head_dim(whole: Config, attribute_map: Mapping[str, str]) -> dict[str, int]:
    """The head dim that classes take where the config has none and the heads do not divide the hidden size."""
    hidden, heads = (whole.get(attribute_map.get(name, name)) for name in ("hidden_size", "num_attention_heads"))
    if type(hidden) is not int or type(heads) is not int or any(whole.get(key) for key in HEAD_KEYS):
        return {}
    return {"head_dim": hidden // heads} if heads and hidden % heads else {}
