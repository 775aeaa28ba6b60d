"""Arithmetic on raw bits (mixed precision: stored in 16 bits, computed in float32).

A 16-bit format has 65,536 values, so a function of single entries is a table that is looked up. Where the
package was installed with a C compiler at hand, the loops over 16-bit entries are compiled (`_bits.c`); the
bits are the same.
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
# Format → the bits of infinity: all ones in the exponent.
EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}


def all_finite(raw: np.ndarray, dtype: str) -> bool:
    """Check that no raw entry is a NaN or an infinity, whose exponents are the largest, whatever the sign."""
    if raw.size == 0:
        return True
    is_contiguous = raw.flags.c_contiguous
    if compiled is not None and is_contiguous and is_short(dtype):
        return compiled.largest(raw) < EXPONENT[dtype]
    largest = EXPONENT[dtype]
    sign = 1 << (8 * raw.itemsize - 1)
    signed = raw.view(f"<i{raw.itemsize}")
    largest_positive = int(signed.max())
    largest_negative = int(raw.max())
    positive_finite = largest_positive < largest
    return positive_finite and largest_negative < sign + largest


def lookup(table: np.ndarray, index: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Look up `table[index]` in a table for all 16-bit numbers; `out` may have a shape it broadcasts to."""
    if out is None:
        out = np.empty(index.shape, table.dtype)
    if compiled is None:
        out[...] = table.take(index)
    else:
        compiled.lookup(table, _broadcast(index, out), out)
    return out


def _broadcast(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Give an array the shape of another; one that has it stays itself."""
    if array.shape == like.shape:
        return array
    return np.broadcast_to(array, like.shape)


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Decode raw bits into numbers of the working type (exact)."""
    if is_short(dtype):
        return lookup(_numbers(dtype), raw)
    return to_float(raw, dtype)


def add(raw: np.ndarray, values: np.ndarray, dtype: str) -> None:
    """Add numbers of the working type to raw bits in place, rounded to nearest, ties to even."""
    if compiled is None or not is_short(dtype):
        total = to_float(raw, dtype) + values
        raw[...] = to_raw(total, dtype)
    else:
        compiled.add(raw, values, dtype == "BF16")


def accumulate(raw: np.ndarray, total: np.ndarray, dtype: str) -> None:
    """Add rows of raw bits to `total`, one after the other: how many come together does not matter.

    Args:
        raw: (rows, columns).
        total: (columns,) of the working type.
    """
    if compiled is None or not is_short(dtype):
        for row in floats(raw, dtype):
            np.add(total, row, out=total)
    else:
        compiled.accumulate(raw, dtype == "BF16", total)


def finite_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Average the finite entries along an axis, float64; 0 where there are none."""
    finite = np.isfinite(values)
    numbers = np.where(finite, values, 0)
    total = numbers.sum(axis=axis, dtype=np.float64)
    count = finite.sum(axis=axis)
    return total / np.maximum(count, 1)


def scaled(
    raw: np.ndarray, factor: Factor, dtype: str, offset: float = 0.0, out: np.ndarray | None = None
) -> np.ndarray:
    """Multiply raw bits by `factor`, rounded once; the true value is the stored one plus `offset`.

    Args:
        factor: one for all entries, or an array that broadcasts with `raw`.
        out: the array for the result; None makes a new one, or returns `raw` itself where nothing changes.
    """
    if is_short(dtype) and isinstance(factor, float) and factor != 1:
        if compiled is None or offset:
            return lookup(_scaling(factor, dtype, offset), raw, out)
        if out is None:
            out = np.empty(raw.shape, raw.dtype)
        entries = _broadcast(raw, out)
        compiled.scale(entries, factor, dtype == "BF16", out)
        return out
    unchanged = isinstance(factor, float) and factor == 1
    result = raw
    if not unchanged:
        numbers = floats(raw, dtype)
        result = rounded(numbers, factor, dtype, offset)
    if out is None:
        return result
    out[...] = result
    return out


def rounded(values: np.ndarray, factor: Factor, dtype: str, offset: float = 0.0) -> np.ndarray:
    """Encode `factor` × numbers as raw bits; the true values are these numbers plus `offset`."""
    factors = np.asarray(factor).astype(working_type(dtype))
    if not offset:
        return to_raw(values * factors, dtype)
    true_values = (values + offset) * factors
    return to_raw(true_values - offset, dtype)


@lru_cache(2)
def _numbers(dtype: str) -> np.ndarray:
    """(65536,) every number of a 16-bit format."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    return to_float(bits, dtype)


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
    """(65536,) `normal_numbers` as raw bits of a 16-bit format."""
    return to_raw(normal_numbers(deviation), dtype)
