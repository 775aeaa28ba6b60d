"""Norms of a tiny model, told by what its modules do with numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Norm:
    """The norm that a parameter is the scale or the shift of; the fields are those of `Sighting`."""

    kind: str | None
    offset: float
    role: str


NO_NORM = Norm(None, 0.0, "")


def find_norms(
    model: PreTrainedModel, inputs: Sequence[tuple[str, torch.Tensor]], outputs: Mapping[str, torch.Tensor]
) -> dict[str, Norm]:
    """Find the parameters of every module that behaves as a norm over its last axis.

    Args:
        inputs, outputs: what modules were given and gave in a forward pass, by the modules' names.
    """
    modules = dict(model.named_modules())
    matrices = {name for name, module in modules.items() if _has_matrix(module)}
    head = model.get_output_embeddings()
    heads = {name for name, module in modules.items() if module is head}
    read = [(reader, entries) for reader, entries in inputs if reader in matrices]
    norms = {}
    for name, out in outputs.items():
        module = modules[name]
        behaviour = _behaviour_of(module)
        if behaviour is None:
            continue
        readers = {reader for reader, entries in read if _same(entries, out)}
        role = "norm" if readers else "post norm"
        if readers & heads:
            role = "final norm"
        norm = Norm(*behaviour, role)
        for part, _ in module.named_parameters(recurse=False):
            norms[f"{name}.{part}"] = norm
    return norms


def _behaviour_of(module: torch.nn.Module) -> tuple[str, float] | None:
    """Test whether a module with a vector of weights and no modules of its own is a norm (`_behaviour`)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    children = list(module.children())
    if children:
        return None
    return _behaviour(module, weight)


def _has_matrix(module: torch.nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return any(parameter.ndim > 1 for parameter in own)


def _behaviour(module: torch.nn.Module, weight: torch.Tensor) -> tuple[str, float] | None:
    """Test whether `module` normalises its last axis: ("layer" or "rms", offset of its scale), else None."""
    numbers = torch.Generator().manual_seed(0)
    width = len(weight)
    inputs = torch.randn(3, width, generator=numbers, dtype=torch.float64)
    stored_weight = weight.data
    try:
        out = module(inputs)
        doubled = module(2 * inputs)
        shifted = module(inputs + 5)
        original = stored_weight.clone()
        stored_weight.zero_()
        unscaled = module(inputs)
        stored_weight.copy_(original)
    except Exception:  # a module that takes more than one tensor is no plain norm
        return None
    # A norm gives the same for twice the input, and is no plain product with its weight.
    same_for_double = torch.allclose(out, doubled, rtol=1e-2, atol=1e-2)
    if not same_for_double:
        return None
    product = inputs * weight
    if torch.allclose(out, product, rtol=1e-3):
        return None
    bias = getattr(module, "bias", None)
    nothing = torch.zeros_like(unscaled)
    if bias is not None:
        nothing = bias.expand_as(unscaled)
    offset = 0.0 if torch.allclose(unscaled, nothing) else 1.0
    removes_mean = torch.allclose(out, shifted, rtol=1e-3, atol=1e-3)
    return ("layer" if removes_mean else "rms"), offset


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Check that two tensors hold the same entries, in rows of the same length."""
    length = one.shape[-1]
    same_rows = length == other.shape[-1]
    same_size = one.numel() == other.numel()
    if not (same_rows and same_size):
        return False
    return torch.equal(one.flatten(), other.flatten())
