"""The cost of writing text, from a model's config alone: the memory at a full context, and the least time of
a token.

Writing one token reads every weight once and the whole cache, and multiplies little: the bandwidth of the
device's memory is what bounds it (arXiv 2211.05102).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from outgrow.model.base.errors import UserError
from outgrow.model.base.quiet import quietly
from outgrow.model.build import empty_model
from outgrow.model.geometry import matmul_parameter_count, parameter_count
from outgrow.model.hollow import hollow
from outgrow.train.machine.activations import on_fakes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF = 2  # bytes of a weight and of an entry of the cache in float16
# Bytes for the driver and the activations of one token: what weights and cache of Phi-1.5 leave of the 3.5 GB
# that its report gives (arXiv 2309.05463, table 1).
ALLOWANCE = 0.3e9


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes of one sequence at a full context, in float16."""

    weights: float
    cache: float  # keys and values of every token, or what else the class keeps of them
    allowance: float = ALLOWANCE

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.allowance


def inference_memory(config: dict[str, Any], context: int) -> InferenceMemory:
    """The memory of writing the last of `context` tokens.

    Raises:
        UserError: the class's forward pass depends on values, so that its cache cannot be counted.
    """
    return InferenceMemory(HALF * parameter_count(config), cache_bytes(config, context))


def cache_bytes(config: dict[str, Any], context: int) -> int:
    """The bytes of the KV cache after `context` tokens in float16, counted on a forward pass of a fake
    network, or of a hollow one where the class asks for values (`model.hollow`): what grouped queries,
    windows and states save is in it.

    Raises:
        UserError: the class's forward pass runs in neither way.
    """
    with FakeTensorMode():
        network = empty_model(config, dtype=torch.float16).eval()
    try:
        return _cache_in(on_fakes, network, context)
    except UserError as refusal:
        try:
            with quietly():
                return _cache_in(hollow, network, context)
        except Exception:  # the library's classes raise every kind
            raise refusal from None


def _cache_in(
    world: Callable[[Any], AbstractContextManager[None]], network: PreTrainedModel, context: int
) -> int:
    """The bytes that a forward pass in the block of `world` leaves in its cache."""
    with world(network), torch.no_grad():
        ids = torch.zeros(1, context, dtype=torch.int64)
        out = network(input_ids=ids, use_cache=True)
    caches = [out.get(name) for name in ("past_key_values", "cache_params")]
    tensors = _tensors(caches, set())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor with axes in a cache, once: the library has a class of cache for each kind of layer, which
    counts in tensors without axes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
        return
    attributes = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    inside = attributes.values()
    for part in value if isinstance(value, list | tuple) else inside:
        yield from _tensors(part, seen)


def least_seconds_per_token(config: dict[str, Any], cache: float, bandwidth: float) -> float:
    """A lower bound on the time of one token of one sequence in float16: (weights that multiply + `cache`) /
    `bandwidth`.

    Args:
        cache: bytes that are read for the token.
        bandwidth: of the device's memory, bytes/s.
    """
    return (HALF * matmul_parameter_count(config) + cache) / bandwidth
