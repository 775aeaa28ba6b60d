"""The number formats of safetensors files as numpy sees them: raw bits, and the floats they stand for.

numpy has no bfloat16, so raw values are unsigned integers of the same width and change to floats only where
arithmetic is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

# safetensors name → numpy type of the raw bits
RAW: dict[str, np.dtype] = {
    "F64": np.dtype("<u8"),
    "F32": np.dtype("<u4"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<u8"),
    "I32": np.dtype("<u4"),
    "I16": np.dtype("<u2"),
    "I8": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    # What growth copies byte for byte and computes nothing on.
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "C64": np.dtype("<u8"),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), np.dtype("u1")),
}
PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # safetensors' formats of less than a byte
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
TORCH_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


# of buffers that models carry beside their weights; others are packed or quantised weights
PLAIN_NUMBERS = ("I64", "BOOL")


def bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor as it is stored."""
    return prod(shape) * RAW[dtype].itemsize


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """The safetensors dtype that a config names for its weights; None where it names none that is known."""
    name = config.get("dtype") or config.get("torch_dtype")
    return TORCH_NAMES.get(str(name).removeprefix("torch."))


def is_short(dtype: str) -> bool:
    """Check for a float format of 16 bits."""
    return dtype in ("F16", "BF16")


def is_float(dtype: str) -> bool:
    """Check whether growth can do arithmetic in this format."""
    return dtype in FLOATS or dtype == "BF16"


def working_type(dtype: str) -> type[np.floating]:
    """The type arithmetic is done in: float64 for float64, else float32."""
    return np.float64 if dtype == "F64" else np.float32


def to_float(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits as numbers in the working type (exact)."""
    if dtype == "BF16":
        bits = raw.astype(np.uint32) << 16
        return bits.view(np.float32)
    values = raw.view(FLOATS[dtype])
    return values.astype(working_type(dtype), copy=False)


def to_raw(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as raw bits of `dtype`, rounded to nearest, ties to even; NaN stays NaN."""
    if dtype != "BF16":
        stored = values.astype(FLOATS[dtype], copy=False)
        return np.ascontiguousarray(stored).view(RAW[dtype])
    singles = np.ascontiguousarray(values, dtype=np.float32)
    bits = singles.view(np.uint32)
    is_odd = (bits >> 16) & np.uint32(1)
    half = bits + np.uint32(0x7FFF)
    rounded = (half + is_odd) >> 16
    rounded = rounded.astype(np.uint16)
    is_nan = np.isnan(values)
    return np.where(is_nan, np.uint16(0x7FC0), rounded)
