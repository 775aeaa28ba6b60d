"""Arithmetic on raw bits. A 16-bit format has 65,536 values, so what is done to each entry alone is looked up, not computed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from model.dtypes import RAW, to_float, to_raw, working_type

from .seeding import quantiles

Factor = float | np.ndarray
EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # the bits of infinity


def is_short(dtype: str) -> bool:
    """Whether a format has 16 bits."""
    return RAW[dtype].itemsize == 2


def all_finite(raw: np.ndarray, dtype: str) -> bool:
    """Whether none of the raw bits is a NaN or an infinity: the exponent of those is the largest, whatever the sign."""
    if raw.size == 0:
        return True
    largest, sign = EXPONENT[dtype], 1 << (8 * raw.itemsize - 1)
    return int(raw.view(f"<i{raw.itemsize}").max()) < largest and int(raw.max()) < sign + largest


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits as numbers in the working type (exact)."""
    if dtype != "F16" or not all_finite(raw, dtype):
        return to_float(raw, dtype)
    # numpy converts half floats one by one; whole arrays of their bits, moved to a float's places, take a third of the time
    wide = raw.view(np.int16).astype(np.int32)
    wide <<= 13
    wide &= ~0x70001FFF  # the sign was copied into the exponent
    values = wide.view(np.float32)
    values *= np.float32(2.0**112)  # the exponents' biases are 15 and 127
    return values


def on_grid(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers rounded to multiples of the smallest number of a format, where `sums` wants that."""
    return np.rint(values * np.float32(2.0**24)) * np.float32(2.0**-24) if dtype == "F16" else values


def sums(raw: np.ndarray, values: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits of the numbers `raw` + `values` (which are `on_grid`), rounded to nearest; ties of half floats away from zero."""
    values = floats(raw, dtype) + values
    if dtype != "F16" or not max(values.max(initial=0), -values.min(initial=0)) < 65504:
        return to_raw(values, dtype)
    # As in `floats`, backwards. Numbers too small for a normal half float need no rounding, since they are on its grid.
    values *= np.float32(2.0**-112)
    bits = values.view(np.int32)
    bits += 0x1000
    bits >>= 13
    total = bits.astype(np.uint16)
    bits >>= 3
    sign = bits.astype(np.uint16)
    sign &= 0x8000
    total |= sign
    return total


def scaled(raw: np.ndarray, factor: Factor, dtype: str, offset: float = 0.0) -> np.ndarray:
    """Raw bits of `factor` × the numbers, rounded once, in terms of the true value where the stored one is `offset` less.

    Args:
        factor: one for all, or an array that broadcasts with `raw`.
    """
    if isinstance(factor, float) and factor == 1:
        return raw
    if isinstance(factor, float) and is_short(dtype):
        return _scaling(factor, dtype, offset).take(raw)
    return rounded(floats(raw, dtype), factor, dtype, offset)


def rounded(values: np.ndarray, factor: Factor, dtype: str, offset: float = 0.0) -> np.ndarray:
    """Raw bits of `factor` × numbers."""
    factors = np.asarray(factor).astype(working_type(dtype))
    return to_raw((values + offset) * factors - offset if offset else values * factors, dtype)


@lru_cache(64)
def _scaling(factor: float, dtype: str, offset: float) -> np.ndarray:
    """(65536,) the raw bits of factor × every number of a 16-bit format."""
    with np.errstate(invalid="ignore", over="ignore"):
        return rounded(to_float(np.arange(1 << 16, dtype=np.uint16), dtype), factor, dtype, offset)


@lru_cache(16)
def normal_bits(deviation: float, dtype: str) -> np.ndarray:
    """(65536,) the raw bits of normal(0, deviation) numbers in a 16-bit format, one per random 16-bit number."""
    return to_raw(quantiles() * np.float32(deviation), dtype)
