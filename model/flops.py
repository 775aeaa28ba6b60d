"""FLOPs by PyTorch's own counter: a forward pass of a model of any class is watched, at its real size on the
meta device.

`torch.utils.flop_counter.FlopCounterMode` counts every multiplication of matrices by its shapes. Two things
are set right here: attention is counted over the pairs of positions that its mask lets through (causal,
sliding windows, chunks), not over all of them; and of experts only those that a token is sent to are computed
(`batched_mm`). Towers that text does not go through are not counted. Attention that chooses among earlier
positions by itself (an indexer with a budget) is counted as if it read all of them.

Shapes in attention: queries (rows, heads, positions, qk), values (rows, heads, positions, v), as the library
hands them over; the result is (rows, positions, heads, v).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from outgrow.model.base.quiet import quietly
from outgrow.model.build import meta_model
from outgrow.model.family import Config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STEP = 64  # tokens: passes over one, two and three times so many give the constant, linear and square parts
EXACT_CONTEXT, SAMPLES = 4096, 1024  # beyond so many positions, so many of them stand for all
NAME = "counted"  # of the attention that only counts


_MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Count:
    """Forward FLOPs per token at one context.

    Attributes:
        matrices: the part that does not depend on the context.
        attention: scores and weighted values, over the pairs of positions that attend.
    """

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention


@dataclass(frozen=True)
class _Call:
    """One layer's attention: its FLOPs for a pair of positions, and the mask of pairs that attend (None:
    causal).
    """

    flops_per_pair: float
    mask: Callable[..., Any] | None


@dataclass(frozen=True)
class Passes:
    """The forward passes of a model, from which every context follows.

    Attributes:
        constant, linear, square: FLOPs of a pass over n tokens are constant + linear · n + square · n² beside
            the calls. The square is of attention that a class computes itself, over all pairs.
        calls: attention that goes through the library's interface, layer by layer.
    """

    constant: float
    linear: float
    square: float
    calls: tuple[_Call, ...]

    def at(self, context: int) -> Count:
        """Compute FLOPs per token at `context` tokens per sequence."""
        means = {id(call.mask): _mean_attended(call.mask, context) for call in self.calls}
        products = [call.flops_per_pair * means[id(call.mask)] for call in self.calls]
        own = self.square * (context + 1) / 2
        attention = sum(products)
        linear = self.linear + self.constant / context
        return Count(linear, attention + own)


def count(model: PreTrainedModel, context: int) -> Count:
    """Count the forward FLOPs per token of a built model at `context` tokens per sequence, as `watch`
    does."""
    return watch(model).at(context)


def watch(model: PreTrainedModel, *, experts: str = "batched_mm") -> Passes:
    """Count the forward passes of a built model of any size.

    The model runs on text, on at most 192 tokens; it may lie on the meta device. Its attention and experts
    are computed by other implementations meanwhile, and it is in eval mode.

    Args:
        experts: the library's implementation of experts that runs.

    Raises:
        Exception: of any kind, as the library's classes raise them where they do not run.
    """
    calls: list[_Call] = []
    text_config = model.config.get_text_config()
    keys = ("max_position_embeddings", "max_seq_len", "n_positions")
    limits = [getattr(text_config, key, None) for key in keys]
    stated = [size for size in limits if size and size > 0]  # a class without a limit says -1
    limit = next(iter(stated), 4 * STEP)
    step = max(1, min(STEP, limit // 4))  # some classes keep a position or two for themselves
    totals = []
    with _counting(model, calls, experts), quietly():
        for length in (step, 2 * step, 3 * step):
            calls.clear()
            totals.append(_forward_flops(model, length))
    first, second, third = totals
    curvature = third - 2 * second + first
    square = curvature / (2 * step**2)
    slope = (second - first) / step
    linear = slope - 3 * square * step
    curved = square * step**2
    constant = first - linear * step - curved
    return Passes(constant, linear, square, tuple(calls))


def counted(config: Config, context: int) -> Count | None:
    """`count` of a model of `config` at its own size, without memory; None where its class does not run
    so."""
    text = json.dumps(config, sort_keys=True, default=repr)
    passes = _watched(text, _Held(config))
    return None if passes is None else passes.at(context)


class _Held(dict[str, Any]):
    """A config beside the text that it is cached by."""

    def __hash__(self) -> int:  # type: ignore[override]
        return 0

    def __eq__(self, other: object) -> bool:
        return True


@lru_cache(maxsize=256)
def _watched(key: str, config: _Held) -> Passes | None:
    from outgrow.model.hollow import hollow

    model = meta_model(dict(config))
    with suppress(Exception):  # the library's classes raise every kind
        return watch(model)
    model.requires_grad_(False)  # the counter follows what learns, which is not asked
    try:
        with hollow(model):
            return watch(model, experts="eager")
    except Exception:
        return None


def _forward_flops(model: PreTrainedModel, length: int) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return counter.get_total_flops()


@contextmanager
def _counting(model: Any, calls: list[_Call], experts: str) -> Iterator[None]:
    """Replace attention by one that only counts, and experts by products of matrices, as far as interfaces
    let it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    counter = _Counter(calls)
    AttentionInterface.register(NAME, counter.attend)
    AttentionMaskInterface.register(NAME, counter.make_mask)
    training = model.training
    with ExitStack() as stack:
        for name, module in _configs(model):
            counting = NAME if "attn" in name else experts
            stack.enter_context(patch.object(module, name, counting))
        stack.enter_context(_asking_no_values())
        stack.callback(model.train, training)
        model.eval()
        try:
            yield
        finally:
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(NAME, None)


@dataclass
class _Counter:
    """Attention that computes nothing and counts its calls.

    Attributes:
        calls: that were counted.
    """

    calls: list[_Call]
    _masks: dict[Any, _MaskFunction] = field(default_factory=dict)  # by storage
    _alive: list[torch.Tensor] = field(default_factory=list)  # so that no storage is used again

    def make_mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Any,
        device: Any = "cpu",
        **_: Any,
    ) -> Any:
        import torch

        mask = torch.zeros(batch_size, 1, q_length, kv_length, device=device)
        if mask.device.type != "meta":  # a class that chooses positions asks which it may see
            hidden = _hidden(mask_function, q_length, kv_length)
            least = torch.finfo(mask.dtype).min
            mask.masked_fill_(hidden, least)
        storage = mask.untyped_storage()
        self._masks[storage._cdata] = mask_function
        self._alive.append(mask)
        return mask

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *_: Any, **__: Any
    ) -> Any:
        rows, heads, positions, qk = query.shape
        v = value.shape[-1]
        mask = None
        if attention_mask is not None:
            storage = attention_mask.untyped_storage()
            mask = self._masks.get(storage._cdata)
        flops_per_pair = 2.0 * heads * (qk + v)
        self.calls.append(_Call(flops_per_pair, mask))
        return query.new_zeros(rows, positions, heads, v), None


@contextmanager
def _asking_no_values() -> Iterator[None]:
    """Answer in the block what the library would ask of tokens that are not there."""
    import torch
    from transformers import masking_utils

    chunked = masking_utils.chunked_overlay
    no_padding = torch.zeros(1, dtype=torch.long)
    # Each row is one sequence.
    single = patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    # Chunks begin after the padding, of which there is none: a count of it would lie on the model's device,
    # which has no values.
    overlay = patch.object(masking_utils, "chunked_overlay", lambda size, _: chunked(size, no_padding))
    # Whether there is padding in the text decides on a warning.
    silent = patch("transformers.PreTrainedModel.warn_if_padding_and_no_attention_mask", lambda *_: None)
    with single, overlay, silent:
        yield


def _configs(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (attribute, config) for every implementation that the configs of a model's modules name."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if id(config) not in seen and hasattr(config, "_attn_implementation_internal"):
            seen.add(id(config))
            yield "_attn_implementation_internal", config
            if hasattr(config, "_experts_implementation_internal"):
                yield "_experts_implementation_internal", config


def _hidden(mask: _MaskFunction, queries: int, keys: int) -> torch.Tensor:
    """The pairs that a mask hides, (query, key), where queries are the last of the keys; the later keys of a
    mask that takes no whole rows of positions.
    """
    import torch

    zero = torch.zeros((), dtype=torch.int64)
    rows = torch.arange(keys - queries, keys)[:, None]
    columns = torch.arange(keys)[None, :]
    try:
        return ~mask(zero, zero, rows, columns).expand(queries, keys)
    except Exception:
        return columns > rows


def _mean_attended(mask: Callable[..., Any] | None, context: int) -> float:
    """Average the number of positions that a position reads over a sequence of `context`.

    Up to `EXACT_CONTEXT` every pair is asked of the mask; beyond, `SAMPLES` queries are, and what lies
    between them is interpolated.
    """
    import torch

    if mask is None:
        return (context + 1) / 2
    queries = torch.arange(context)
    if context > EXACT_CONTEXT:
        spread = torch.linspace(0, context - 1, SAMPLES)
        queries = spread.round().long()
    zero = torch.zeros((), dtype=torch.int64)
    keys = torch.arange(context)[None, :]
    try:
        columns = [part[:, None] for part in queries.split(128)]
        parts = [mask(zero, zero, column, keys) for column in columns]
        sums = [part.expand(-1, context).sum(1) for part in parts]
        attended = torch.cat(sums).double()
    except Exception:  # a mask that takes no whole rows of positions
        return (context + 1) / 2
    if context <= EXACT_CONTEXT:
        return float(attended.mean())
    # The sum over all positions, by the trapezoidal rule and the halves of both ends.
    neighbours = attended[1:] + attended[:-1]
    between = (queries.diff() * neighbours / 2).sum()
    first_and_last = attended[0] + attended[-1]
    ends = first_and_last / 2
    return float((between + ends) / context)
