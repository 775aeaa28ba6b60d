"""FP8 weights with scales, as plain ones: rows are dequantised as they are read, as `transformers` does on
loading.

A matrix `X.weight` of 8-bit floats has its factors beside it, as `X.weight_scale_inv` (`transformers`,
DeepSeek) or `X.weight_scale` (vLLM, llm-compressor, FBGEMM, ModelOpt): one for the whole matrix, one for each
row, or one for each block of the size that the config names. By either name the weight is entry × factor,
rounded to the dtype that the config names (bfloat16 where it names none). Scales of what runs through the
matrix (`X.input_scale`, `k_scale`) are dropped, and that is told.

Shapes: a block is (height, width); the factors of weights (…, rows, columns) are (), (…), (… rows) or
(…, ⌈rows / height⌉, ⌈columns / width⌉), and may end in axes of size 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.dtypes import config_dtype, is_float, to_float, to_raw
from outgrow.model.headers import Stored
from outgrow.model.keys import is_size
from outgrow.model.quantisation import is_plain, quantisation_entries, without_quantisation

if TYPE_CHECKING:
    import torch

METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8", "modelopt")  # whose factors multiply
# ends of the names of the factors, and names of the numbers that are of activations, keys and values
SCALES = ("_scale_inv", "_scale")
ACTIVATION = re.compile(r"\.(activation|input|output|prob|[qkv]|kv)_(scale|zero_point)(_ub)?$")
EXPONENTS = ("F8_E8M0", "U8")  # formats of factors that are powers of two
# format → (bits of the exponent, of the fraction, what is subtracted from the exponent, whether the largest
# exponent is an infinity's)
FORMATS = {"F8_E4M3": (4, 3, 7, False), "F8_E5M2": (5, 2, 15, True)}


def numbers(dtype: str) -> np.ndarray:
    """(256,) every number of an 8-bit float format, float32."""
    exponent_bits, fraction_bits, bias, infinite = FORMATS[dtype]
    bits = np.arange(256)
    exponent_mask = (1 << exponent_bits) - 1
    exponent = bits >> fraction_bits & exponent_mask
    steps = 1 << fraction_bits
    fraction = (bits & steps - 1) / steps
    power = exponent - bias
    normal = np.ldexp(1 + fraction, power)
    subnormal = np.ldexp(fraction, 1 - bias)
    size = np.where(exponent > 0, normal, subnormal)
    if infinite:
        top = exponent == exponent_mask
        is_nan = fraction[top] > 0
        size[top] = np.where(is_nan, np.nan, np.inf)
    else:
        size[(bits & 0x7F) == 0x7F] = np.nan
    is_negative = bits & 0x80
    signed = np.where(is_negative, -size, size)
    return signed.astype(np.float32)


class Dequantised(Checkpoint):
    """A checkpoint of FP8 weights, seen as one of plain weights; see `Checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, block: tuple[int, int] | None) -> None:
        vars(self).update(vars(checkpoint))
        self._block = block
        self._all = checkpoint.tensors
        self._method = checkpoint.quantised
        self._dtype = config_dtype(checkpoint.config) or "BF16"
        self.config = without_quantisation(checkpoint.config)
        self.quantised = None
        self._scales = _scales(self._all)
        self._dropped = [name for name, stored in self._all.items() if _is_of_activations(name, stored)]
        apart = {*self._scales.values(), *self._dropped}
        self.tensors = {name: self._plain(name) for name in self._all if name not in apart}
        UserError.collect(self._misfits())

    def _plain(self, name: str) -> Stored:
        stored = self._all[name]
        if stored.dtype not in FORMATS:
            return stored
        return Stored(stored.file, stored.offset, self._dtype, stored.shape)

    def _misfits(self) -> list[str]:
        """Faults of the scales, in words."""
        faults = []
        for name, scale in self._scales.items():
            entry = self._all[scale]
            if not is_float(entry.dtype) and entry.dtype not in EXPONENTS:
                faults.append(f"{self.folder}: {scale} holds {entry.dtype}, which are no factors")
            if self._part(name) is None and prod(entry.shape) != 1:
                shape = self._all[name].shape
                shapes = " or ".join(map(str, self._shapes(shape)))
                fault = f"{scale} has shape {entry.shape} where {shapes} is expected"
                faults.append(f"{self.folder}: {fault}")
        return faults[:3]

    def _shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that the factors of a tensor may have, the grid of blocks first."""
        shapes = [(), shape[:-1], shape[:-2]]
        if self._block is not None and len(shape) > 1:
            shapes.insert(0, _grid(shape, self._block))
        return list(dict.fromkeys(shapes))

    def _part(self, name: str) -> tuple[int, int] | None:
        """(height, width) of the part of a matrix that has one factor; None where one is for the whole
        tensor, or the shapes do not fit."""
        shape = self._all[name].shape
        scale_shape = self._all[self._scales[name]].shape
        if len(shape) < 2:
            return None
        rows, columns = shape[-2:]
        bare = _without_ones(scale_shape)
        if self._block is not None and bare == _without_ones(_grid(shape, self._block)):
            return self._block
        if bare == _without_ones(shape[:-1]):
            return 1, columns
        if bare and bare == _without_ones(shape[:-2]):
            return rows, columns
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        into = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}[self._dtype]
        dropped = ["quantization_config"]
        if self._dropped:
            dropped.append(f"{len(self._dropped)} scales of activations ({self._dropped[0]}, …)")
        return (
            *super().notes,
            (
                f"weights quantised by {self._method} are dequantised into {into} as they are read; dropped: "
                f"{', '.join(dropped)}"
            ),
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        stored = self._all[name]
        raw = self._read_rows(name, stored, start, stop)
        if stored.dtype not in FORMATS:
            return raw
        count = len(raw)
        factors = self._factors(name, stored, start, count)
        values = numbers(stored.dtype)[raw]
        return to_raw(values * factors, self._dtype)

    def _factors(self, name: str, stored: Stored, start: int, count: int) -> np.ndarray:
        """The factor of each entry of some rows, float32; of one factor for all, that one."""
        scale = self._scales[name]
        entry = self._all[scale]
        raw = self._read_rows(scale, entry, 0, None)
        if entry.dtype in EXPONENTS:
            exponents = raw.astype(np.int32) - 127
            factors = np.ldexp(np.float32(1), exponents)
        else:
            values = to_float(raw, entry.dtype)
            factors = values.astype(np.float32)
        part = self._part(name)
        if part is None:
            return factors.reshape(-1)
        height, width = part
        rows, columns = stored.shape[-2:]
        *_, grid_rows, grid_columns = _grid(stored.shape, part)
        row = np.arange(start, start + count)
        matrix, row_of_matrix = np.divmod(row, rows)
        first = matrix * grid_rows
        row_of_grid = first + row_of_matrix // height
        lines = factors.reshape(-1, grid_columns)[row_of_grid]
        entries = np.repeat(lines, width, axis=1)
        return entries[:, :columns]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every tensor, plain, in memory."""
        import torch

        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        kinds |= {"F64": torch.float64, "I64": torch.int64, "BOOL": torch.bool}
        state = {}
        for name, stored in self.tensors.items():
            raw = self.read(name)
            signed = raw.view(f"i{raw.itemsize}")
            kind = kinds[stored.dtype]
            tensor = torch.from_numpy(signed).view(kind)
            state[name] = tensor.reshape(stored.shape)
        return state


def dequantised(checkpoint: Checkpoint) -> Dequantised | None:
    """A checkpoint of FP8 weights with scales as a plain one; None of any other.

    Raises:
        UserError: the scales are not those of its weights.
    """
    if not _is_fp8(checkpoint) or obstacle(checkpoint) is not None:
        return None
    blocks = _blocks(checkpoint)
    return Dequantised(checkpoint, next(blocks, None))


def _is_fp8(checkpoint: Checkpoint) -> bool:
    """Check for 8-bit floats of a method that is known here."""
    is_known = checkpoint.quantised in METHODS
    return is_known and any(stored.dtype in FORMATS for stored in checkpoint.tensors.values())


def obstacle(checkpoint: Checkpoint) -> str | None:
    """The reason, in words, why a checkpoint of FP8 weights is not dequantised on the way; None where it is,
    and of any other checkpoint."""
    if not _is_fp8(checkpoint):
        return None
    stored = checkpoint.tensors
    scales = _scales(stored)
    apart = {*scales, *scales.values()}
    rest = [
        name for name, entry in stored.items() if name not in apart and not _is_of_activations(name, entry)
    ]
    for name in rest:
        dtype = stored[name].dtype
        if name.endswith("_zero_point"):
            return f"{name} shifts its weights"
        if dtype in FORMATS:
            return f"{name} has no scales {name}{SCALES[0]} or {name}{SCALES[1]} beside it"
        if not is_plain(dtype):
            return f"{name} holds {dtype}, which is neither plain nor FP8"
    if quantisation_entries(checkpoint.config).get("transform_config"):
        return "its transform_config turns what runs through the weights"
    blocks = sorted(set(_blocks(checkpoint)))
    if len(blocks) > 1:
        return f"it has blocks of several sizes ({', '.join(map(str, blocks))})"
    return None


def _scales(stored: Mapping[str, Stored]) -> dict[str, str]:
    """Matrix of 8-bit floats → the tensor with its factors, where it has one."""
    scales = {}
    for name, entry in stored.items():
        beside = [name + end for end in SCALES if name + end in stored]
        if entry.dtype in FORMATS and beside:
            scales[name] = beside[0]
    return scales


def _is_of_activations(name: str, stored: Stored) -> bool:
    """Check for one number of what runs through a matrix, which plain weights have no use for."""
    return ACTIVATION.search(name) is not None and prod(stored.shape) == 1


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the factors of a tensor in blocks."""
    parts = [-(-size // length) for size, length in zip(shape[-2:], block, strict=True)]
    return (*shape[:-2], *parts)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without axes of size 1 at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _blocks(checkpoint: Checkpoint) -> Iterator[tuple[int, int]]:
    """The block sizes that a config names: its own, or those of its groups.

    Raises:
        UserError: one is no block size.
    """
    entries = quantisation_entries(checkpoint.config)
    sizes: list[tuple[str, Any]] = [("weight_block_size", entries.get("weight_block_size"))]
    groups = entries.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = (group.get("weights") if isinstance(group, Mapping) else None) or {}
        width = weights.get("group_size")
        in_groups = [1, width] if is_size(width) else None
        sizes.append(("block_structure", weights.get("block_structure") or in_groups))
    for key, size in sizes:
        if size is None:
            continue
        is_pair = isinstance(size, list) and len(size) == 2
        if not is_pair or not all(map(is_size, size)):
            raise UserError(
                f"{checkpoint.folder}: {key} must be two positive whole numbers; found {size!r:.80}"
            )
        yield size[0], size[1]
