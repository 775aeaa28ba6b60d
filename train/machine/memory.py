"""The memory of one GPU in training, from shapes alone: what is held at each of the moments at which a step
may be at its peak.

loss      the forward pass has ended: every layer keeps what its backward pass needs, and the logits are
          turned into their gradient
backward  the last layer goes backward first, while all others still keep theirs; with checkpointing it is
          computed again
the end   the first layer goes backward last: little is kept, all gradients are there (where a step has one
          micro-batch, not before)
reduced   of a sharded run: embeddings and head, which no layer holds, hand their gradients to the other
          processes when all is done

Beside them: benchmarks/bench_memory.py, which holds these numbers against PyTorch's `FSDPMemTracker`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from operator import mul
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.base.quiet import quietly
from outgrow.model.build import empty_model, known_size
from outgrow.model.hollow import hollow, size_of
from outgrow.train.loss import CHUNK_TOKENS
from outgrow.train.machine.compile import fuse_activations, layers_of, speed_up
from outgrow.train.settings import Settings
from outgrow.train.start.way import find_attention, fuses

MASTER, GRADIENT = 4, 4  # bytes of a weight and of its gradient: both float32, also where bfloat16 multiplies
SHORT = 64  # tokens of the shortest pass of a hollow network
BLOCK = 256  # entries that share one float32 scale in torchao's 8-bit state
STATE = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / BLOCK), "muon": 8.0}  # bytes of an entry's optimizer state
MUON_STATE = 4.0  # of a hidden matrix's entry: one momentum instead of two moments


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, part by part."""

    weights: float
    gradients: float
    optimizer: float
    # of a sharded model: weights that are whole at a time, and gradients while they are exchanged
    gathered: float
    # kept for the backward pass or made in it, with weights' bfloat16 copies and gradients before they are
    # exchanged
    activations: float
    logits: float  # with what their loss and its gradient need

    @property
    def total(self) -> float:
        state = self.weights + self.gradients + self.optimizer
        return state + self.gathered + self.activations + self.logits


def memory(
    settings: Settings, config: dict[str, Any], network: Any, groups: dict[str, tuple[int, int]], rows: int
) -> Memory:
    """The bytes of one GPU that computes `rows` windows at a time, at the moment of a step when they are the
    most.

    Args:
        network: on fake tensors, in float32.
        groups: the optimizer's, name → (tensors, entries).

    Raises:
        UserError: the class does not support checkpointing, or its forward pass does not run.
    """
    held = moments(settings, config, network, groups, rows)
    return max(held.values(), key=lambda moment: moment.total)


def moments(
    settings: Settings, config: dict[str, Any], network: Any, groups: dict[str, tuple[int, int]], rows: int
) -> dict[str, Memory]:
    """The memory at each moment of a step at which it may be the most; arguments as of `memory`."""
    loop = settings.train
    gpus = settings.forecast.gpus
    bf16 = loop.precision != "fp32"
    sharded = settings.sharding.name == "full" and gpus > 1
    shards = gpus if sharded else 1
    if sharded and bf16:
        # As FSDP gathers them: autocast copies no weight, and layers hand on bfloat16.
        attention = network.config._attn_implementation
        with FakeTensorMode():
            network = empty_model(config, dtype=torch.bfloat16, attention=attention)
    fuse_activations(network)  # as in a run: a chain of kernels keeps more
    try:
        kept = kept_by(network, rows, loop.context, bf16=bf16, checkpointing=loop.checkpointing)
    except UserError:
        find_attention(config, "auto", torch.device("cpu"), "bf16" if bf16 else "fp32")  # as a run refuses it
        raise
    speed_up(network, loop)  # refuses what the class does not support
    entries = sum(count for _, count in groups.values())
    # The gradients of the micro-batches before it stand, and DDP's buckets always do; else they begin empty.
    micro_batches = -(-loop.batch_tokens // loop.context // gpus // rows)
    buckets = gpus > 1 and not sharded
    full = entries * GRADIENT / shards
    before = full if micro_batches > 1 or buckets else 0.0
    forward, backward = logits(
        config, rows * loop.context, fused=fuses(config, loop.loss), bf16=bf16, sharded=sharded
    )
    # Autocast's copies of the layers' weights live as long as its forward pass; without checkpointing the
    # layers keep them.
    casts = bf16 and not sharded and loop.checkpointing
    copies = 2.0 * layer_entries(network) if casts else 0.0
    none = Gathered(0.0, 0.0, 0.0, 0.0, 0.0)
    reshard = settings.sharding.reshard_after_forward
    fsdp = gathered(network, 2 if bf16 else 4, reshard, checkpointing=loop.checkpointing) if sharded else none
    models = 1 if loop.ema is None else 2  # the weights, and their average
    rest = Memory(
        models * entries * MASTER / shards,
        before,
        optimizer_state(settings.optimizer.name, groups) / shards,
        0.0,
        0.0,
        0.0,
    )
    return {
        "forward": replace(rest, gathered=fsdp.loss, activations=kept.loss + copies, logits=forward),
        "loss": replace(rest, gathered=fsdp.loss, activations=kept.loss, logits=backward),
        "backward": replace(rest, gathered=fsdp.backward, activations=kept.backward + fsdp.gradients),
        "end": replace(rest, gradients=full, gathered=fsdp.end, activations=kept.end + fsdp.gradients),
        "reduced": replace(rest, gradients=full, gathered=fsdp.reduced),
    }


def optimizer_state(name: str, groups: dict[str, tuple[int, int]]) -> float:
    """The bytes of the whole optimizer state."""
    total: float = 0
    for group, (_, count) in groups.items():
        by_muon = name == "muon" and group in ("hidden", "experts")
        bytes_each = MUON_STATE if by_muon else STATE[name]
        total += count * bytes_each
    return total


# ---- sharding ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """The bytes that FSDP holds whole, moment by moment."""

    loss: float
    backward: float
    end: float
    reduced: float
    gradients: float  # of weights, while a layer goes backward and before they are handed over


def gathered(network: Any, width: int, reshard: bool, *, checkpointing: bool = True) -> Gathered:
    """Bytes that FSDP holds unsharded, of entries of `width` bytes; gradients are exchanged in float32.

    What lies in no layer (embeddings, head) is whole from the first layer to the last and back; of the
    layers, one computes while the buffer of the next arrives, and in the backward pass its gradients are made
    while those of the layer behind it are exchanged. The head's gradient waits for the embedding's, and both
    are exchanged when all is done. Without resharding after the forward pass, every layer stays whole for the
    backward pass. Without checkpointing, the last layer's gradients take less than what it no longer keeps,
    so that the peak is before them.
    """
    everything = _entries(network)
    one = max(map(_entries, layers_of(network)), default=0)
    ends = everything - layer_entries(network)
    head: Any = network.get_output_embeddings()
    top = 0 if head is None else head.weight.numel()
    exchanged = GRADIENT * one
    return Gathered(
        loss=width * (ends + one if reshard else everything),
        backward=width * (ends + 2 * one if reshard else everything) + (exchanged if checkpointing else 0),
        end=width * (ends + one) + exchanged,
        reduced=(width + GRADIENT) * ends + exchanged,
        gradients=width * ((one if checkpointing else 0) + top),
    )


def layer_entries(network: Any) -> int:
    """The entries of all weights that lie in layers."""
    return sum(map(_entries, layers_of(network)))


def _entries(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- activations -------------------------------------------------------------------------------------------


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
    if rows * context <= 3 * SHORT:
        return measure(rows, context)
    if context <= 3 * SHORT:
        return _times(rows, measure(1, context))
    lengths = [1, 2, 3]
    points = [measure(1, SHORT * length) for length in lengths]
    x = context / SHORT
    shares = (
        (x - 2) * (x - 3) / 2,
        -(x - 1) * (x - 3),
        (x - 1) * (x - 2) / 2,
    )  # of the parabola through them
    moments = zip(*map(astuple, points), strict=True)
    one = Kept(*(round(sum(map(mul, shares, sizes))) for sizes in moments))
    return _times(rows, one)


def _times(rows: int, one: Kept) -> Kept:
    return Kept(*(rows * size for size in astuple(one)))


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
    kept: dict[int, tuple[Tensor, int | None]] = {}  # storage → a tensor of it, and the layer that keeps it
    inputs: dict[int, Tensor] = {}  # of layers, by their storage
    inside: list[int | None] = [None]

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), (tensor, inside[-1]))
        return tensor

    def enter(number: int, layer: Any, arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.is_floating_point():
                inputs[_storage(argument)] = argument
        inside.append(number)

    def leave(*_: Any) -> None:
        inside.pop()

    hooks: list[Any] = []
    for number, layer in enumerate(layers_of(network)):
        hooks.append(layer.register_forward_pre_hook(partial(enter, number)))
        hooks.append(layer.register_forward_hook(leave))
    try:
        with world(network):
            weights = set(map(_storage, network.parameters()))
            _forward(network, rows, context, bf16, keep)
    finally:
        for hook in hooks:
            hook.remove()
    everything = outside = 0
    layers: dict[int, list[int]] = defaultdict(list)
    for storage, (tensor, keeper) in kept.items():
        if storage in weights:
            continue
        bytes_kept = size(tensor)
        everything += bytes_kept
        if storage in inputs:
            continue
        if keeper is None:
            outside += bytes_kept
        else:
            layers[keeper].append(bytes_kept)
    entered = sum(map(size, inputs.values()))
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
        UserError: the class's forward pass depends on values, which a fake network has not.
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
            f"the memory of {type(network).__name__} cannot be forecast: its forward pass depends "
            f"on values of weights or tokens, which there are none of here ({in_one_line(fault)})"
        ) from None


# ---- loss --------------------------------------------------------------------------------------------------


def logits(
    config: dict[str, Any], tokens: int, *, fused: bool, bf16: bool = False, sharded: bool = False
) -> tuple[float, float]:
    """The bytes of the loss at the end of the forward pass and at the beginning of the backward pass.

    Plain: forward, the logits, in float32 too where they are bfloat16, and log-probabilities, (tokens, vocab)
    each; backward, log-probabilities, their gradient and the logits' gradient, in float32. Fused: a chunk's
    logits, turned into their gradient in place, and the gradients of the head and of its input, which the
    forward pass makes and the backward pass scales. bfloat16 needs copies: of the head and its input, or
    where both are fused, of what is not float32.
    """
    vocab = known_size(config, "vocab_size") or 0
    hidden = known_size(config, "hidden_size") or 0
    table = float(tokens * vocab)
    head = float(vocab * hidden)
    inputs = float(tokens * hidden)
    if not fused:
        copied = inputs if sharded else head + inputs
        copies = 2 * copied if bf16 else 0.0
        forward = (10 if bf16 else 8) * table
        return copies + forward, copies + 12 * table
    copied = head + inputs if sharded else inputs
    copies = 4 * copied if bf16 else 0.0
    gradients = 4 * (head + inputs)
    chunk = 4.0 * min(CHUNK_TOKENS, tokens) * vocab
    return copies + gradients + chunk, 2 * gradients
