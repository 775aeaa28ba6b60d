"""Causal attention for mixed precision on a CPU, where PyTorch's own kernel takes five times as long backward
in bfloat16 as in float32.

Shapes: queries, keys and values are (rows, heads, context, entry), as `transformers` hands them to an
attention implementation; several heads of queries may share one of keys and values (GQA).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

SDPA = "sdpa"
LONGEST = 512  # tokens of context whose probabilities are kept for the backward pass
BLOCK, BLOCKS = 64, 4  # queries of a block at least, and blocks at most
SPECIAL = ("position_bias", "softcap", "cache")  # arguments under which attention is not plain


@contextmanager
def fast_mixed_attention() -> Iterator[None]:
    """While it is open, networks whose attention is SDPA compute it by `mixed_attention`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[SDPA] = mixed_attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[SDPA]


def mixed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Compute what the library's SDPA does.

    Under autocast on a CPU, causal attention over a short context in a compiled layer is a few products of
    matrices in bfloat16, with the softmax in float32 (`in_blocks`); all else is PyTorch's kernel in float32.

    Returns:
        (rows, context, heads, entry), and no weights.
    """
    if not torch.is_autocast_enabled("cpu"):
        operands = (query, key, value, attention_mask)
        return sdpa_attention_forward(module, *operands, dropout, scaling, is_causal, **rest)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = dropout or any(rest.get(name) is not None for name in SPECIAL)
    length = query.shape[2]
    plain = causal and attention_mask is None and not special and key.shape[2] == length
    if plain and length <= LONGEST and torch.compiler.is_compiling():
        groups = query.shape[1] // key.shape[1]
        keys, values = repeat_kv(key, groups), repeat_kv(value, groups)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return in_blocks(query * scale, keys, values).transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    wide = (query.float(), key.float(), value.float(), attention_mask)
    with torch.autocast("cpu", enabled=False):
        result, _ = sdpa_attention_forward(module, *wide, dropout, scaling, is_causal, **rest)
    return result.to(torch.bfloat16), None


def in_blocks(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention by matrix products, in the operands' dtype or autocast's, and a softmax in float32.

    A block of queries at a time, each over the keys up to its end: of four blocks the products are 5/8 of the
    whole ones.

    Args:
        queries: scaled.
    """
    length = queries.shape[2]
    count = max(1, min(BLOCKS, length // BLOCK))
    bounds = [number * length // count for number in range(count + 1)]
    results = []
    for begin, end in pairwise(bounds):
        scores = queries[:, :, begin:end] @ keys[:, :, :end].transpose(2, 3)
        places = torch.arange(end, device=scores.device)
        later = places > places[begin:, None]
        probabilities = scores.float().masked_fill(later, -torch.inf).softmax(-1)
        results.append(probabilities.to(values.dtype) @ values[:, :, :end])
    return torch.cat(results, 2)
