"""A hollow network: weights without memory and products that are not computed, for forward passes that ask
for values.

A meta or fake network has no values, so a class that loops over the experts its tokens chose, or that asks
how many tokens a mask lets through, does not run on one. Hollow weights are zeros that share one entry, and
each product of matrices gives zeros of its shape; everything else (choices, masks, indices) is computed as it
is. Experts whose scores are equal, as they are here, are chosen evenly: token i takes the k experts behind
those of token i - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# copies of a weight, in another dtype or of one expert, which are as hollow as the weight is
COPIES = (aten._to_copy.default, aten.clone.default, aten.index.Tensor, aten.index_select.default)


@contextmanager
def hollow(network: nn.Module) -> Iterator[None]:
    """Run a network of any size, on whatever device it lies, on the CPU in the block, with hollow weights and
    products.
    """
    fillings = {id(tensor): _filling(tensor) for tensor in _tensors(network)}
    entries: list[tuple[dict[str, Any], str, Tensor]] = [
        (owner, name, tensor)
        for module in network.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]
    for owner, name, tensor in entries:
        owner[name] = fillings[id(tensor)]
    try:
        with _Hollow():
            yield
    finally:
        for owner, name, tensor in entries:
            owner[name] = tensor


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _filling(tensor: Tensor) -> Tensor:
    """Zeros of a tensor's shape and dtype, in the memory of one; a parameter in place of a parameter."""
    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(zeros, requires_grad=tensor.requires_grad)
    return zeros


class _Hollow(TorchDispatchMode):
    """Give zeros for every product of matrices, and spread choices among equals."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket in flop_registry:
            return tree_map_only(Tensor, _zeros, _on_shapes(func, args, kwargs))
        if func is aten._grouped_mm.default:  # (token, in), (expert, in, out): the counter does not know it
            return args[0].new_zeros(args[0].shape[0], args[1].shape[2])
        if func in COPIES and _is_hollow(args[0]):
            return tree_map_only(Tensor, _filling, _on_shapes(func, args, kwargs))
        result = func(*args, **kwargs)
        if func is aten.topk.default:
            return self._spread(args[0], *result)
        return result

    def _spread(self, scores: Tensor, values: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Choices of experts, (token, expert) → (token, choice), evenly where all scores are equal."""
        are_matrices = scores.ndim == choices.ndim == 2
        if not are_matrices or choices.shape[1] >= scores.shape[1]:
            return values, choices
        first = scores[:1, :1]
        all_equal = bool((scores == first).all())
        if not all_equal:
            return values, choices
        numbers = torch.arange(self.chosen, self.chosen + choices.numel())
        self.chosen += choices.numel()
        return values, (numbers % scores.shape[1]).view(choices.shape)


def _on_shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the meta device, where only shapes are computed."""
    shapes, named = tree_map_only(Tensor, _shape, (args, {**kwargs}))
    if "device" in named:
        named["device"] = torch.device("meta")
    return func(*shapes, **named)


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _zeros(shape: Tensor) -> Tensor:
    return torch.zeros(shape.shape, dtype=shape.dtype)


def _is_hollow(tensor: Tensor) -> bool:
    """Check for a weight of several entries that share one."""
    return tensor.numel() > 1 and not any(tensor.stride())


def size_of(tensor: Tensor) -> int:
    """The bytes that a tensor's storage would have in a network whose weights are their own."""
    return max(tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size())
