"""Executing a plan: source rows in, target rows out, a bounded block at a time; the same bits for any number of threads or shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from math import prod, sqrt
from statistics import NormalDist
from typing import Protocol

import numpy as np

from model.dtypes import RAW, to_float, to_raw, working_type

from .expansion import AxisMap, Fill, product, runs
from .plan import Plan, Step
from .seeding import generator

# Of the target. Small enough that the allocator reuses temporaries instead of taking fresh memory each time, which costs more than the
# arithmetic; part of the result's definition, since random entries are drawn block by block.
BLOCK_BYTES = 1 << 20


class Reader(Protocol):
    """Where source tensors come from: a checkpoint on disk or arrays in memory."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of a tensor as raw bits."""


@dataclass(frozen=True, eq=False)
class Expander:
    """Computes one target tensor, block of rows by block of rows.

    A vector is treated as a matrix of one row. Reading axes grow before writing axes: the mean row of a writer is an additional source row.
    """

    plan: Plan
    step: Step
    reader: Reader

    @cached_property
    def dtype(self) -> str:
        return self.plan.dtype(self.step)

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the target seen as a matrix."""
        shape = self.step.shape
        return (1, prod(shape)) if len(shape) < 2 else (shape[0], prod(shape[1:]))

    @cached_property
    def maps(self) -> tuple[AxisMap, AxisMap]:
        maps = self.step.maps
        unit = AxisMap.identity(1)
        return (maps[0], reduce(product, maps[1:])) if len(maps) > 1 else (unit, maps[0] if maps else unit)

    @cached_property
    def column_runs(self) -> list[slice]:
        """Stretches of columns that lie side by side in the source too and share gain and fill."""
        columns = self.maps[1]
        fresh = ~columns.copies
        return list(runs(np.where(fresh, np.arange(columns.target), columns.index), columns.gain, columns.fill))

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, raw rows) until the tensor is complete."""
        rows, columns = self.matrix
        height = max(1, BLOCK_BYTES // (columns * RAW[self.dtype].itemsize))
        for start in range(0, rows, height):
            yield start, self._block(start, min(start + height, rows))

    def _block(self, start: int, stop: int) -> np.ndarray:
        shape = (stop - start, self.matrix[1])
        if self.step.zero:
            return to_raw(np.full(shape, self._stored(0.0)), self.dtype)
        if self.step.source is None:
            return to_raw(self._fresh(shape, "fresh", start), self.dtype)
        rows = self.maps[0]
        index, gain, fill = rows.index[start:stop], rows.gain[start:stop], rows.fill[start:stop]
        target = self._expand_columns(self._source_rows(self.step.source, index, fill == Fill.COPY), gain, start)
        if self.step.next_source is not None:
            self._take_from_next(target, start, stop)
        if self.step.diagonal:
            self._keep_diagonal(target, start, stop)
        if self.noise_scale:
            self._add_noise(target, start, stop)
        if (mean := fill == Fill.MEAN).any():
            target[mean] = self._expand_columns(self._mean_row, gain[mean][:1], start)
        if (zero := fill == Fill.ZERO).any():
            target[zero] = to_raw(np.zeros(1), self.dtype)
        if (fresh := fill == Fill.RANDOM).any():
            target[fresh] = to_raw(self._fresh((int(fresh.sum()), shape[1]), "rows", start), self.dtype)
        return target

    def _take_from_next(self, target: np.ndarray, start: int, stop: int) -> None:
        """Overwrite, in `target`, the rows or columns that come from the next source layer."""
        rows, columns = self.maps
        taken = rows.fill[start:stop] == Fill.NEXT
        if taken.any():
            source = self._source_rows(self.step.next_source, rows.index[start:stop], taken)
            target[taken] = self._expand_columns(source, rows.gain[start:stop], start)[taken]
        taken = columns.fill == Fill.NEXT
        if taken.any():
            source = self._source_rows(self.step.next_source, rows.index[start:stop], rows.fill[start:stop] == Fill.COPY)
            values = to_float(source[:, columns.index[taken]], self.dtype)
            target[:, taken] = self._scaled(values, rows.gain[start:stop], columns.gain[taken])

    def _keep_diagonal(self, target: np.ndarray, start: int, stop: int) -> None:
        """Let the n-th copies on the writing axis read the n-th copies only, undivided; both axes take copies in turn."""
        reading = self.step.tensor.reads.index(True)
        count = int(self.maps[reading].counts()[0])
        rows, columns = (axis.number() for axis in self.maps)
        met = rows[start:stop, None] % count == columns[None] if reading else rows[start:stop, None] == columns[None] % count
        target[...] = to_raw(to_float(target, self.dtype) * np.where(met, count, 0).astype(working_type(self.dtype)), self.dtype)

    def _source_rows(self, name: str | None, index: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """(len(index), n) raw rows of the source tensor `name`; rows that are not `taken` hold anything."""
        assert name is not None
        wanted = index[taken]
        if len(wanted) == 0:
            return np.zeros((len(index), self.maps[1].source), RAW[self.dtype])
        low, high = int(wanted.min()), int(wanted.max()) + 1
        stretch = self._read(name, low, high)
        if high - low == len(index) and len(wanted) == len(index) and (np.diff(index) == 1).all():
            return stretch
        return stretch.take(np.clip(index - low, 0, high - low - 1), axis=0)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        if len(self.step.shape) < 2:
            return self.reader.read(name).reshape(1, -1)
        return self.reader.read(name, start, stop).reshape(stop - start, -1)

    def _stretches(self, rows: int, height: int) -> Iterator[np.ndarray]:
        """The source as numbers, `height` rows at a time."""
        assert self.step.source is not None
        for start in range(0, rows, height):
            yield to_float(self._read(self.step.source, start, min(start + height, rows)), self.dtype)

    @cached_property
    def _mean_row(self) -> np.ndarray:
        """(1, n) the mean of all source rows, rounded to the stored dtype."""
        rows, columns = self.maps[0].source, self.maps[1].source
        height = max(1, BLOCK_BYTES // (columns * RAW[self.dtype].itemsize))
        total = np.zeros(columns, np.float64)
        for stretch in self._stretches(rows, height):
            total += stretch.sum(axis=0, dtype=np.float64)
        return to_raw((total / rows)[None], self.dtype)

    def _expand_columns(self, source: np.ndarray, gain: np.ndarray, start: int) -> np.ndarray:
        """(b, n) raw source rows → (b, N) raw target rows; `gain` is one factor per row."""
        columns = self.maps[1]
        target = np.empty((len(source), columns.target), RAW[self.dtype])
        for run in self.column_runs:
            fill, factor = int(columns.fill[run.start]), float(columns.gain[run.start])
            width = run.stop - run.start
            if fill == Fill.NEXT:
                continue  # filled in by `_take_from_next`
            if fill == Fill.ZERO:
                target[:, run] = to_raw(np.full(1, self._stored(0.0)), self.dtype)
            elif fill == Fill.RANDOM:
                target[:, run] = to_raw(self._fresh((len(source), width), "columns", start, run.start), self.dtype)
            elif fill == Fill.MEAN:
                mean = to_float(source, self.dtype).mean(axis=1, keepdims=True, dtype=np.float64)
                target[:, run] = self._scaled(mean, gain, factor)
            else:
                first = int(columns.index[run.start])
                piece = source[:, first : first + width]
                unscaled = factor == 1 and (gain == 1).all()
                target[:, run] = piece if unscaled else self._scaled(to_float(piece, self.dtype), gain, factor)
        return target

    @cached_property
    def noise_scale(self) -> float:
        """Standard deviation of the noise on one reader of copies; 0 where the tensor reads none."""
        if self.plan.noise == 0 or len(self.step.shape) < 2 or self._noisy_axis is None:
            return 0.0
        rows, columns = self.maps[0].source, self.maps[1].source
        height = max(1, BLOCK_BYTES // (columns * RAW[self.dtype].itemsize))
        square = sum(float(np.square(stretch, dtype=np.float64).sum()) for stretch in self._stretches(rows, height))
        return self.plan.noise * sqrt(square / (rows * columns))

    @cached_property
    def _noisy_axis(self) -> int | None:
        """The axis on which copies are read, if there is one."""
        reads = self.step.tensor.reads
        return next((axis for axis, read in enumerate(reads) if read and self.maps[axis].counts().max() > 1), None)

    def _add_noise(self, target: np.ndarray, start: int, stop: int) -> None:
        """Add noise to the readers of copies, in raw rows `start:stop`.

        Where the readers were divided, all copies of an index but the last get noise and the last gets minus its sum: they still sum to the
        source. Where they were not, every reader of copies gets noise of its own.
        """
        axis = self._noisy_axis
        assert axis is not None
        grown = self.maps[axis]
        counts, number = grown.counts()[grown.index], grown.number()
        repeated = grown.copies & (counts > 1)
        divided = bool((grown.gain[repeated] < 1).all())
        noisy = repeated & (number < counts - 1) if divided else repeated
        last_of = np.zeros(grown.source, np.int64)
        last_of[grown.index[repeated]] = np.flatnonzero(repeated)  # the last assignment to an index wins
        scale = (self.noise_scale * grown.gain).astype(working_type(self.dtype))

        def add(where: tuple[slice, np.ndarray] | tuple[np.ndarray, slice], values: np.ndarray) -> None:
            target[where] = to_raw(to_float(target[where], self.dtype) + values, self.dtype)

        if axis == 1:
            for copy in range(int(number[noisy].max()) + 1):
                chosen = np.flatnonzero(noisy & (number == copy))
                values = self._normal((stop - start, len(chosen)), "noise", start, copy) * scale[chosen]
                add((slice(None), chosen), values)
                if divided:
                    add((slice(None), last_of[grown.index[chosen]]), -values)
            return
        for row in range(start, stop):
            if noisy[row]:
                add((np.array([row - start]), slice(None)), self._normal((1, self.matrix[1]), "noise", row) * scale[row])
            elif divided and repeated[row]:
                others = np.flatnonzero(noisy & (grown.index == grown.index[row]))
                values = sum(self._normal((1, self.matrix[1]), "noise", other) * scale[other] for other in others.tolist())
                add((np.array([row - start]), slice(None)), -np.asarray(values))

    def _scaled(self, values: np.ndarray, gain: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
        """gain × values as raw bits, in terms of the true value where the stored one is offset."""
        offset = self.step.tensor.line.offset
        factors = (gain[:, None] * factor).astype(working_type(self.dtype))
        return to_raw((values + offset) * factors - offset if offset else values * factors, self.dtype)

    def _stored(self, value: float) -> float:
        return value - self.step.tensor.line.offset

    def _fresh(self, shape: tuple[int, int], *part: object) -> np.ndarray:
        """Fresh entries, as the library initialises them: ones in norm scales, zeros in biases, else normal(0, initializer_range)."""
        tensor = self.step.tensor
        if tensor.is_bias:
            return np.zeros(shape)
        if tensor.line.kind.endswith("norm"):
            return np.full(shape, self._stored(1.0))
        return self._normal(shape, *part) * np.float32(self.plan.growth.target_config.get("initializer_range", 0.02))

    def _normal(self, shape: tuple[int, int], *part: object) -> np.ndarray:
        """Standard normal float32 numbers that depend on seed, tensor and part alone.

        For 16-bit formats they are the 65,536 quantiles of the normal distribution, three times as fast to draw and finer than the format.
        """
        numbers = generator(self.plan.growth.seed, self.step.name, *part)
        if RAW[self.dtype].itemsize > 2:
            return numbers.standard_normal(shape, np.float32)
        count = prod(shape)
        bits = numbers.bit_generator.random_raw(-(-count // 4)).view(np.uint16)[:count]
        return normal_quantiles().take(bits).reshape(shape)


@cache
def normal_quantiles() -> np.ndarray:
    """(65536,) the standard normal distribution's quantiles at the middles of as many equal shares, float32."""
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((share + 0.5) / 65536) for share in range(32768, 65536)])
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)


class Arrays:
    """Source tensors in memory, as raw arrays by name."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of a tensor as raw bits."""
        return self.arrays[name][start:stop]
