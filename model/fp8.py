"""FP8 weights with scales by block, as plain ones: each block of rows is dequantised as it is read, as
`transformers` does on loading.

A matrix `X.weight` of 8-bit floats has a matrix `X.weight_scale_inv` beside it, one factor for each block of
`weight_block_size` (or one for all); the weight is entry × factor, rounded to the dtype that the config names
(bfloat16 where it names none).

Shapes: a block is (height, width); the scales of weights (…, rows, columns) are (…, ⌈rows / height⌉,
⌈columns / width⌉).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint, Stored, is_plain, quantisation_entries, without_quantisation
from outgrow.model.dtypes import config_dtype, to_float, to_raw
from outgrow.model.keys import is_size

if TYPE_CHECKING:
    import torch

# ends of the names of what stands beside a quantised matrix
SCALE, ACTIVATION = "_scale_inv", ".activation_scale"
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

    def __init__(self, checkpoint: Checkpoint, blocks: tuple[int, int] | None) -> None:
        vars(self).update(vars(checkpoint))
        self._blocks = blocks
        self._all = checkpoint.tensors
        self._dtype = config_dtype(checkpoint.config) or "BF16"
        self.config = without_quantisation(checkpoint.config)
        self.quantised = None
        weights = [name for name in self._all if not name.endswith((SCALE, ACTIVATION))]
        self.tensors = {name: self._plain(name) for name in weights}
        UserError.collect(self._misfits())

    def _plain(self, name: str) -> Stored:
        stored = self._all[name]
        if stored.dtype not in FORMATS:
            return stored
        return Stored(stored.file, stored.offset, self._dtype, stored.shape)

    def _misfits(self) -> list[str]:
        """Faults of the scales, in words."""
        faults = []
        for name, stored in self._all.items():
            if stored.dtype not in FORMATS:
                continue
            grid = self._all[name + SCALE].shape
            expected = self._grid(stored.shape)
            if grid != expected and prod(grid) != prod(expected):
                scale = name + SCALE
                fault = f"{scale} has shape {grid} where {expected} is expected"
                faults.append(f"{self.folder}: {fault}")
        return faults[:3]

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a tensor."""
        if self._blocks is None or len(shape) < 2:
            return ()
        return (
            *shape[:-2],
            *(-(-size // block) for size, block in zip(shape[-2:], self._blocks, strict=True)),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        into = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}[self._dtype]
        return (
            *super().notes,
            (
                f"weights quantised by fp8 are dequantised into {into} as they are read; "
                "quantization_config is dropped"
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
        """The scale of each entry of some rows, float32; of one scale for all, that one."""
        held = self._all[name + SCALE]
        raw = self._read_rows(name + SCALE, held, 0, None)
        if held.dtype in ("F8_E8M0", "U8"):  # exponents alone
            exponents = raw.astype(np.int32) - 127
            scales = np.ldexp(np.float32(1), exponents)
        else:
            values = to_float(raw, held.dtype)
            scales = values.astype(np.float32)
        grid = self._grid(stored.shape)
        if not grid or self._blocks is None:
            return scales.reshape(-1)[:1]
        height, width = self._blocks
        rows, columns = stored.shape[-2:]
        row = np.arange(start, start + count)
        matrix, row_of_matrix = np.divmod(row, rows)
        first = matrix * grid[-2]
        row_of_grid = first + row_of_matrix // height
        grid_rows = scales.reshape(-1, grid[-1])
        lines = grid_rows[row_of_grid]
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
        UserError: the scales are not those of its blocks.
    """
    stored = checkpoint.tensors
    quantised = {name for name, entry in stored.items() if entry.dtype in FORMATS}
    if checkpoint.quantised != "fp8" or not quantised:
        return None
    beside = {name for name in stored if name.endswith((SCALE, ACTIVATION))}
    rest = stored.keys() - beside - quantised
    all_plain = all(is_plain(stored[name].dtype) for name in rest)
    has_scales = all(name + SCALE in stored for name in quantised)
    if not has_scales or not all_plain:
        return None
    return Dequantised(checkpoint, _blocks(checkpoint))


def _blocks(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """The block size that a config names; None where one scale is for the whole matrix."""
    size = quantisation_entries(checkpoint.config).get("weight_block_size")
    if size is None:
        return None
    is_pair = isinstance(size, list) and len(size) == 2
    if not is_pair or not all(map(is_size, size)):
        raise UserError(
            f"{checkpoint.folder}: weight_block_size must be two positive whole numbers; found {size!r:.80}"
        )
    return size[0], size[1]
