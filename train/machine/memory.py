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

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from outgrow.model.base.errors import UserError
from outgrow.model.build import empty_model, known_size
from outgrow.train.loss import CHUNK_TOKENS
from outgrow.train.machine.activations import Kept, kept_by
from outgrow.train.machine.compile import fuse_activations, layers_of, speed_up
from outgrow.train.settings import LoopSettings, Settings
from outgrow.train.start.way import find_attention, fuses

MASTER, GRADIENT = 4, 4  # bytes of a weight and of its gradient: both float32, also where bfloat16 multiplies
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
    by_moment = moments(settings, config, network, groups, rows)
    return max(by_moment.values(), key=lambda moment: moment.total)


def moments(
    settings: Settings, config: dict[str, Any], network: Any, groups: dict[str, tuple[int, int]], rows: int
) -> dict[str, Memory]:
    """The memory at each moment of a step at which it may be the most; arguments as of `memory`."""
    loop = settings.train
    gpus = settings.forecast.gpus
    bf16 = loop.precision != "fp32"
    sharded = settings.sharding.name == "full" and gpus > 1
    if sharded and bf16:
        # As FSDP gathers them: autocast copies no weight, and layers hand on bfloat16.
        attention = network.config._attn_implementation
        with FakeTensorMode():
            network = empty_model(config, dtype=torch.bfloat16, attention=attention)
    stored = _activations(network, config, rows, loop, bf16=bf16)
    speed_up(network, loop)  # refuses what the class does not support
    tokens = rows * loop.context
    fused = fuses(config, loop.loss)
    forward, backward = logits(config, tokens, fused=fused, bf16=bf16, sharded=sharded)
    # Autocast's copies of the layers' weights live as long as its forward pass; without checkpointing the
    # layers keep them.
    casts = bf16 and not sharded and loop.checkpointing
    copies = 2.0 * layer_entries(network) if casts else 0.0
    fsdp = Gathered(0.0, 0.0, 0.0, 0.0, 0.0)
    if sharded:
        width = 2 if bf16 else 4
        reshard = settings.sharding.reshard_after_forward
        fsdp = gathered(network, width, reshard, checkpointing=loop.checkpointing)
    rest = _at_rest(settings, groups, rows, sharded=sharded)
    full = _entries_in(groups) * GRADIENT / (gpus if sharded else 1)
    return {
        "forward": replace(rest, gathered=fsdp.loss, activations=stored.loss + copies, logits=forward),
        "loss": replace(rest, gathered=fsdp.loss, activations=stored.loss, logits=backward),
        "backward": replace(rest, gathered=fsdp.backward, activations=stored.backward + fsdp.gradients),
        "end": replace(rest, gradients=full, gathered=fsdp.end, activations=stored.end + fsdp.gradients),
        "reduced": replace(rest, gradients=full, gathered=fsdp.reduced),
    }


def _activations(network: Any, config: dict[str, Any], rows: int, loop: LoopSettings, *, bf16: bool) -> Kept:
    """The activations of `rows` windows, in the network as a run has it.

    Raises:
        UserError: the class's forward pass does not run; as a run refuses it, if it does.
    """
    fuse_activations(network)  # as in a run: a chain of kernels keeps more
    try:
        return kept_by(network, rows, loop.context, bf16=bf16, checkpointing=loop.checkpointing)
    except UserError:
        precision = "bf16" if bf16 else "fp32"
        find_attention(config, "auto", torch.device("cpu"), precision)
        raise


def _at_rest(settings: Settings, groups: dict[str, tuple[int, int]], rows: int, *, sharded: bool) -> Memory:
    """The bytes that stay throughout a step: weights, the optimizer's state, and gradients as it begins."""
    loop = settings.train
    gpus = settings.forecast.gpus
    shards = gpus if sharded else 1
    entries = _entries_in(groups)
    # The gradients of the micro-batches before it stand, and DDP's buckets always do; else they begin empty.
    windows = -(-loop.batch_tokens // loop.context)
    micro_batches = -(-windows // gpus // rows)
    buckets = gpus > 1 and not sharded
    full = entries * GRADIENT / shards
    gradients = full if micro_batches > 1 or buckets else 0.0
    models = 1 if loop.ema is None else 2  # the weights, and their average
    weights = models * entries * MASTER / shards
    state = optimizer_state(settings.optimizer.name, groups) / shards
    return Memory(weights, gradients, state, gathered=0.0, activations=0.0, logits=0.0)


def _entries_in(groups: dict[str, tuple[int, int]]) -> int:
    """The entries of all weights that an optimizer steps."""
    return sum(count for _, count in groups.values())


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
