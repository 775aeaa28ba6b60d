"""Arithmetic on raw bits. A 16-bit format has 65,536 values, so what is done to each entry alone is looked up, not computed.

Where the package was installed with a C compiler at hand, the loops over 16-bit entries are compiled (`_bits.c`); the bits are the same.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from outgrow.growth.engine.seeding import quantiles
from outgrow.model.dtypes import is_short, to_float, to_raw, working_type

try:
    from outgrow.growth.engine import _bits as compiled
except ImportError:
    compiled = None  # type: ignore[assignment]

Factor = float | np.ndarray
EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # the bits of infinity


def all_finite(raw: np.ndarray, dtype: str) -> bool:
    """Whether none of the raw bits is a NaN or an infinity: the exponent of those is the largest, whatever the sign."""
    if raw.size == 0:
        return True
    if compiled is not None and is_short(dtype) and raw.flags.c_contiguous:
        return compiled.largest(raw) < EXPONENT[dtype]
    largest, sign = EXPONENT[dtype], 1 << (8 * raw.itemsize - 1)
    return int(raw.view(f"<i{raw.itemsize}").max()) < largest and int(raw.max()) < sign + largest


def lookup(table: np.ndarray, index: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """`table[index]` of a table for all 16-bit numbers; into `out` where given, to whose shape it broadcasts."""
    if out is None:
        out = np.empty(index.shape, table.dtype)
    if compiled is None:
        out[...] = table.take(index)
    else:
        compiled.lookup(table, index if index.shape == out.shape else np.broadcast_to(index, out.shape), out)
    return out


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits as numbers in the working type (exact)."""
    return lookup(_numbers(dtype), raw) if is_short(dtype) else to_float(raw, dtype)


def add(raw: np.ndarray, values: np.ndarray, dtype: str) -> None:
    """Raw bits += numbers of the working type, rounded to nearest, ties to even."""
    if compiled is None or not is_short(dtype):
        raw[...] = to_raw(to_float(raw, dtype) + values, dtype)
    else:
        compiled.add(raw, values, dtype == "BF16")


def accumulate(raw: np.ndarray, total: np.ndarray, dtype: str) -> None:
    """`total` += rows of raw bits as numbers of the working type, one after the other: it does not matter how many come together.

    Args:
        raw: (rows, columns).
        total: (columns,) of the working type.
    """
    if compiled is None or not is_short(dtype):
        for row in floats(raw, dtype):
            np.add(total, row, out=total)
    else:
        compiled.accumulate(raw, dtype == "BF16", total)


def scaled(raw: np.ndarray, factor: Factor, dtype: str, offset: float = 0.0, out: np.ndarray | None = None) -> np.ndarray:
    """Raw bits of `factor` × the numbers, rounded once, in terms of the true value where the stored one is `offset` less.

    Args:
        factor: one for all, or an array that broadcasts with `raw`.
        out: where they go; else into a new array, or `raw` itself where nothing changes.
    """
    if is_short(dtype) and isinstance(factor, float) and factor != 1:
        if compiled is None or offset:
            return lookup(_scaling(factor, dtype, offset), raw, out)
        out = np.empty(raw.shape, raw.dtype) if out is None else out
        compiled.scale(raw if raw.shape == out.shape else np.broadcast_to(raw, out.shape), factor, dtype == "BF16", out)
        return out
    result = raw if isinstance(factor, float) and factor == 1 else rounded(floats(raw, dtype), factor, dtype, offset)
    if out is None:
        return result
    out[...] = result
    return out


def rounded(values: np.ndarray, factor: Factor, dtype: str, offset: float = 0.0) -> np.ndarray:
    """Raw bits of `factor` × numbers."""
    factors = np.asarray(factor).astype(working_type(dtype))
    return to_raw((values + offset) * factors - offset if offset else values * factors, dtype)


@lru_cache(2)
def _numbers(dtype: str) -> np.ndarray:
    """(65536,) every number of a 16-bit format."""
    return to_float(np.arange(1 << 16, dtype=np.uint16), dtype)


@lru_cache(64)
def _scaling(factor: float, dtype: str, offset: float) -> np.ndarray:
    """(65536,) the raw bits of factor × every number of a 16-bit format."""
    with np.errstate(invalid="ignore", over="ignore"):
        return rounded(_numbers(dtype), factor, dtype, offset)


@lru_cache(16)
def normal_numbers(deviation: float) -> np.ndarray:
    """(65536,) normal(0, deviation) numbers, one per random 16-bit number, float32."""
    return quantiles() * np.float32(deviation)


@lru_cache(16)
def normal_bits(deviation: float, dtype: str) -> np.ndarray:
    """(65536,) their raw bits in a 16-bit format."""
    return to_raw(normal_numbers(deviation), dtype)
