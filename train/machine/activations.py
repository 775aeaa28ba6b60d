"""The activations that a network keeps for its backward pass, counted on a forward pass without memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial
from operator import mul
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.base.quiet import quietly
from outgrow.model.hollow import hollow, size_of
from outgrow.train.machine.compile import layers_of

SHORT = 64  # tokens of the shortest pass of a hollow network


@dataclass(frozen=True)
class Kept:
    """The bytes of activations, moment by moment: at the loss, where the last layer goes backward, and where
    the first one does."""

    loss: float
    backward: float
    end: float


def kept_by(network: Any, rows: int, context: int, *, bf16: bool, checkpointing: bool = False) -> Kept:
    """The bytes that the layers keep for the backward pass over (rows, context) tokens, counted on a forward
    pass of a fake network.

    With activation checkpointing, what all layers keep is their inputs, and the backward pass holds beside
    them the one layer whole that it is computing again (the largest). Going backward through a layer takes
    two gradients of the size of its largest tensor, of what a kernel gave and of what it took. A network
    that is compiled keeps less: the compiler fuses element-wise steps and computes some of them again.

    Where the class asks for values, which a fake network has not, short passes of a hollow one are counted
    (`model.hollow`), its experts chosen evenly, and continued to the context: what is kept grows with its
    square at most, and with the rows.

    Raises:
        UserError: the class's forward pass runs in neither way.
    """
    how = partial(_kept, network, bf16=bf16, checkpointing=checkpointing)
    try:
        return how(rows, context, world=on_fakes, size=_bytes)
    except UserError as refusal:
        try:
            with quietly():
                return _continued(partial(how, world=hollow, size=size_of), rows, context)
        except Exception:  # the library's classes raise every kind
            raise refusal from None


def _continued(measure: Callable[[int, int], Kept], rows: int, context: int) -> Kept:
    """The bytes that (rows, context) tokens keep, by passes over one row of one, two
    and three times `SHORT` tokens where they are longer.
    """
    longest = 3 * SHORT
    tokens = rows * context
    if tokens <= longest:
        return measure(rows, context)
    if context <= longest:
        one = measure(1, context)
        return _times(rows, one)
    lengths = (SHORT, 2 * SHORT, longest)
    points = [measure(1, length) for length in lengths]
    x = context / SHORT
    shares = (
        (x - 2) * (x - 3) / 2,
        -(x - 1) * (x - 3),
        (x - 1) * (x - 2) / 2,
    )  # of the parabola through them
    moments = zip(*map(astuple, points), strict=True)
    sums = [sum(map(mul, shares, sizes)) for sizes in moments]
    one = Kept(*map(round, sums))
    return _times(rows, one)


def _times(rows: int, one: Kept) -> Kept:
    return Kept(*(rows * size for size in astuple(one)))


@dataclass
class _Recorder:
    """A record of what layers keep in a forward pass.

    Attributes:
        kept: by storage: a tensor of it, and the number of the layer that keeps it.
        inputs: of layers, by their storage.
        inside: the numbers of the layers that are running, the innermost last.
    """

    kept: dict[int, tuple[Tensor, int | None]] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    inside: list[int | None] = field(default_factory=lambda: [None])

    def keep(self, tensor: Tensor) -> Tensor:
        """Record a tensor that autograd saves."""
        self.kept.setdefault(_storage(tensor), (tensor, self.inside[-1]))
        return tensor

    @contextmanager
    def watching(self, network: Any) -> Iterator[None]:
        """Record in the block which layer is running, and what it is given."""
        hooks: list[Any] = []
        for number, layer in enumerate(layers_of(network)):
            enter = partial(self._enter, number)
            hooks.append(layer.register_forward_pre_hook(enter))
            hooks.append(layer.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, number: int, layer: Any, arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.is_floating_point():
                self.inputs[_storage(argument)] = argument
        self.inside.append(number)

    def _leave(self, *_: Any) -> None:
        self.inside.pop()


def _kept(
    network: Any,
    rows: int,
    context: int,
    *,
    bf16: bool,
    checkpointing: bool,
    world: Callable[[Any], AbstractContextManager[None]],
    size: Callable[[Tensor], int],
) -> Kept:
    """`kept_by` of a forward pass in the block of `world`; `size` is of a tensor's storage, in bytes."""
    recorder = _Recorder()
    with recorder.watching(network), world(network):
        weights = set(map(_storage, network.parameters()))
        _forward(network, rows, context, bf16, recorder.keep)
    everything = outside = 0
    layers: dict[int, list[int]] = defaultdict(list)
    for storage, (tensor, keeper) in recorder.kept.items():
        if storage in weights:
            continue
        bytes_kept = size(tensor)
        everything += bytes_kept
        if storage in recorder.inputs:
            continue
        if keeper is None:
            outside += bytes_kept
        else:
            layers[keeper].append(bytes_kept)
    entered = sum(map(size, recorder.inputs.values()))
    once = max(map(sum, layers.values()), default=0)
    largest = max(map(max, layers.values()), default=0)
    gradients = 2 * largest
    first_input = entered / max(1, len(layers))
    first = outside + once + gradients + first_input
    if checkpointing:
        loss = entered + outside
        return Kept(loss, loss + once + gradients, first)
    return Kept(everything, everything + gradients, first)


def _storage(tensor: Tensor) -> int:
    """A number that tensors share which share their memory."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _forward(network: Any, rows: int, context: int, bf16: bool, keep: Callable[[Tensor], Tensor]) -> None:
    """One forward pass of a network, every tensor that autograd saves handed to `keep`."""
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with autocast, hooks:
        ids = torch.zeros(rows, context, dtype=torch.int64)
        network.train().base_model(input_ids=ids, use_cache=False)


@contextmanager
def on_fakes(network: Any) -> Iterator[None]:
    """Run a fake network's forward pass in the block.

    Raises:
        UserError: the class's forward pass fails, or depends on values, which a fake network has not.
    """

    def first_expert(tokens: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return tokens @ weight[0].to(tokens.dtype)

    # Experts in groups have no fake kernel in float32; the product with one of them has the shapes, and keeps
    # what they keep.
    grouped = patch("transformers.integrations.moe._grouped_mm", first_expert)
    single = patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    try:
        weight = next(network.parameters())
        with weight.fake_mode, quietly(), grouped, single:
            yield
    except Exception as fault:  # the library's classes raise every kind
        raise UserError(
            f"the memory of {type(network).__name__} cannot be forecast: the sizes of its config do not go "
            "together, or its forward pass depends on values of weights or tokens, which there are none of "
            f"here ({in_one_line(fault)})"
        ) from None
