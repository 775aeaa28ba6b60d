"""Arithmetic on raw bits. A 16-bit format has 65,536 values, so what is done to each entry alone is looked up, not computed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from model.dtypes import RAW, to_float, to_raw, working_type

from .seeding import quantiles

Factor = float | np.ndarray


def is_short(dtype: str) -> bool:
    """Whether a format has 16 bits."""
    return RAW[dtype].itemsize == 2


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits as numbers in the working type (exact)."""
    return _all_floats().take(raw) if dtype == "F16" else to_float(raw, dtype)


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


@lru_cache(1)
def _all_floats() -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return to_float(np.arange(1 << 16, dtype=np.uint16), "F16")


@lru_cache(64)
def _scaling(factor: float, dtype: str, offset: float) -> np.ndarray:
    """(65536,) the raw bits of factor × every number of a 16-bit format."""
    with np.errstate(invalid="ignore", over="ignore"):
        return rounded(to_float(np.arange(1 << 16, dtype=np.uint16), dtype), factor, dtype, offset)


@lru_cache(16)
def normal_bits(deviation: float, dtype: str) -> np.ndarray:
    """(65536,) the raw bits of normal(0, deviation) numbers in a 16-bit format, one per random 16-bit number."""
    return to_raw(quantiles() * np.float32(deviation), dtype)
