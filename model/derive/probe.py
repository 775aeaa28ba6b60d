"""Questions to a family's class that need no forward pass: what it builds, saves, renames, leaves out and
computes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.build import library_class, to_hf_config
from outgrow.model.derive.unfit import Unfit
from outgrow.model.family import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


def build(config: Config, device: str = "meta") -> PreTrainedModel:
    """Build a model of `config` in float64 with eager attention and experts; on the meta device it takes no
    memory.

    Raises:
        Unfit: the library's classes refuse the config; the message quotes them.
    """
    try:
        apart = torch.random.fork_rng(devices=[])
        with apart, torch.device(device):
            hf_config = to_hf_config(config)
            hf_config._experts_implementation = "eager"
            model = library_class(hf_config).from_config(
                hf_config, dtype=torch.float64, attn_implementation="eager", trust_remote_code=False
            )
            return model.eval()
    except UserError as fault:
        raise Unfit(str(fault)) from None
    except Exception as fault:  # the library's classes raise every kind
        kind = config.get("model_type")
        raise Unfit(
            f"transformers' class for {kind!r} does not build from this config ({in_one_line(fault)})"
        ) from None


def stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Collect the tensors that the library would save, by the names it would give them; works on the meta
    device.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def shapes(config: Config) -> dict[str, Shape]:
    """List name → shape of every tensor that a checkpoint of `config` has, built on the meta device."""
    return _shapes_of(build(config))


def _shapes_of(model: PreTrainedModel) -> dict[str, Shape]:
    tensors = stored(model)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def named_shapes(config: Config, names: Iterable[str]) -> tuple[dict[str, Shape], dict[str, str]]:
    """List the `shapes`, and which of their names each of `names` stands for.

    An older file may have the same tensor under another name, which the library renames as it loads.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = build(config)
    own = _shapes_of(model)
    mapping = get_model_conversion_mapping(model)
    state = model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def loaded(name: str) -> str:
        """Name the parameter that the library makes of a tensor, or of several."""
        prefix = model.base_model_prefix
        parameter, *_ = rename_source_key(name, renamings, converters, prefix, state)
        return str(parameter)

    # Parameter → the names of today's tensors that it is loaded from.
    parts: dict[str, list[str]] = defaultdict(list)
    for name in own:
        parts[loaded(name)].append(name)

    def called(name: str) -> str:
        """Find today's name of a tensor: of the parts of its parameter, the one whose name ends most like
        it."""
        if name in own:
            return name
        parts_of_one = parts.get(loaded(name), [name])
        return max(parts_of_one, key=lambda other: _common_ending(name, other))

    return own, {name: called(name) for name in names}


def _common_ending(name: str, other: str) -> int:
    """Count the words that two names share from the end."""
    words = reversed(name.split("."))
    other_words = reversed(other.split("."))
    pairs = zip(words, other_words, strict=False)
    shared = takewhile(lambda pair: pair[0] == pair[1], pairs)
    return len(list(shared))


def passed_over(config: Config, names: Iterable[str]) -> list[str]:
    """List a checkpoint's tensors that the library skips as it loads, such as layers that predict further
    tokens.
    """
    patterns = build(config)._keys_to_ignore_on_load_unexpected or ()
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def tied_names(config: Config, names: Iterable[str]) -> list[str]:
    """List a checkpoint's tensors that the library ties to another, which is stored too."""
    tied = list(build(config).all_tied_weights_keys)
    return [name for name in names if any(_ends_alike(name, one) for one in tied)]


def _ends_alike(name: str, other: str) -> bool:
    """Check whether two names are the same, but for what precedes one of them."""
    dotted = f".{name}"
    other_dotted = f".{other}"
    ends_alike = other.endswith(dotted) or name.endswith(other_dotted)
    return name == other or ends_alike


def computed(config: Config) -> dict[str, Shape]:
    """List name → shape of every buffer that the class computes and no checkpoint has."""
    model = build(config)
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name not in saved]
    return {name: tuple(buffer.shape) for name, buffer in buffers}


def factors(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """List the single numbers that the class computes and no checkpoint has: of buffers, and of modules'
    attributes.
    """
    model = build(config, "cpu")
    saved = model.state_dict().keys()
    unsaved = [(name, buffer) for name, buffer in model.named_buffers() if name not in saved]
    buffers = {name: float(buffer) for name, buffer in unsaved if buffer.ndim == 0}
    attributes: dict[str, float] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if type(value) is float:
                attributes[f"{name}.{key}"] = value
    return buffers, attributes


def scramble(model: PreTrainedModel, seed: int = 1) -> None:
    """Set every parameter, norm scales and biases included, to random values far from any initialisation."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            normal = torch.randn(shape, generator=numbers, dtype=torch.float64)
            values = normal * 0.2
            of_norm = "norm" in name.lower() and "bias" not in name
            is_scale = of_norm and parameter.ndim == 1
            parameter.copy_(values + 1 if is_scale else values)
