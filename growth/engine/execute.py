"""Executing a plan: source rows in, target rows out, a bounded block at a time; the same bits for any blocks, threads and shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import prod, sqrt
from typing import Protocol

import numpy as np

from outgrow.growth.decision import Step
from outgrow.growth.engine.bits import EXPONENT, accumulate, all_finite, floats, lookup, normal_bits, rounded, scaled
from outgrow.growth.engine.noise import Noise
from outgrow.growth.engine.runs import Strips, consecutive, runs
from outgrow.growth.engine.seeding import Draws, normal
from outgrow.growth.expansion import AxisMap, Fill, product
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.dtypes import RAW, is_short, to_raw, working_type
from outgrow.model.notation import Space, spaces
from outgrow.model.starts import Start

BLOCK_BYTES = 1 << 21  # of the target: small enough that temporaries stay in the processor's cache and their memory is used again
NEW_TOKENS = 1e-3  # how far new tokens are from the mean of the old, and so from each other, relative to the rows' root mean square
STRETCH = 32  # source rows that are summed in the working type before their sum is added up in float64


class Reader(Protocol):
    """Where source tensors come from: a checkpoint on disk, or tensors in memory."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of a tensor as raw bits, in an array that the caller may write to.

        Returns:
            (rows, columns), where all axes but the last count rows together; of a vector its entries.
        """


class RowSum:
    """The sum of rows that arrive in order, some at a time: a stretch is summed in the working type, stretches in float64.

    Attributes:
        rows: how many rows were added.
    """

    def __init__(self, columns: int, dtype: str) -> None:
        self.rows, self.dtype = 0, dtype
        self._stretch, self._whole = np.zeros(columns, working_type(dtype)), np.zeros(columns)

    def add(self, raw: np.ndarray) -> None:
        """Add the next rows, as raw bits: (b, columns)."""
        done = 0
        while done < len(raw):
            part = raw[done : done + STRETCH - self.rows % STRETCH]
            accumulate(part, self._stretch, self.dtype)
            done += len(part)
            self.rows += len(part)
            if self.rows % STRETCH == 0:
                self._whole += self._stretch
                self._stretch[:] = 0

    @property
    def total(self) -> np.ndarray:
        return self._whole + self._stretch


@dataclass(frozen=True, eq=False)
class Expander:
    """Computes one target tensor, block of rows by block of rows, for one thread at a time.

    A vector is treated as a matrix of one row, and of more than two axes all but the last count rows together: a block is small however
    large a model's experts are. Reading axes grow before writing axes: the mean row of a writer is an additional source row.
    """

    plan: Plan
    step: Step
    reader: Reader
    _draws: dict[str, Draws] = field(default_factory=dict)

    @cached_property
    def dtype(self) -> str:
        return self.plan.dtype(self.step)

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the target seen as a matrix."""
        shape = self.step.shape
        return (1, prod(shape)) if len(shape) < 2 else (prod(shape[:-1]), shape[-1])

    @cached_property
    def maps(self) -> tuple[AxisMap, AxisMap]:
        maps = self.step.maps
        unit = AxisMap.identity(1)
        return (reduce(product, maps[:-1]), maps[-1]) if len(maps) > 1 else (unit, maps[0] if maps else unit)

    @property
    def is_blank(self) -> bool:
        """Whether all bits of the tensor are zero."""
        return self.step.zero and not self._zero.any()

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of consecutive blocks."""
        rows, columns = self.matrix
        height = max(1, BLOCK_BYTES // (columns * RAW[self.dtype].itemsize))
        for start in range(0, rows, height):
            yield start, min(start + height, rows)

    def whole(self) -> np.ndarray:
        """The whole tensor, raw, in its shape."""
        target = np.empty(self.matrix, RAW[self.dtype])
        for start, stop in self.blocks():
            self.fill(target[start:stop], start)
        return target.reshape(self.step.shape)

    def fill(self, target: np.ndarray, start: int) -> None:
        """Compute raw rows `start`, `start + 1`, … into `target`, one of the `blocks`: (b, columns)."""
        rows = np.arange(start, start + len(target))
        self._fill_all(target, rows)
        if self.dtype in EXPONENT and not all_finite(target, self.dtype):
            self._check_source(rows)

    def _check_source(self, rows: np.ndarray) -> None:
        """Rows of the target are not finite: the source's must not be either.

        Raises:
            UserError: the source is finite, so that scaling or noise went beyond the largest number of the format.
        """
        for name in {self.step.source, self.step.next_source} - {None}:
            copied = self.maps[0].fill[rows] != Fill.MEAN
            index = np.unique(self.maps[0].index[rows]) if copied.all() else np.arange(self.maps[0].source)
            if not all_finite(np.ascontiguousarray(self._gather(name, index)), self.dtype):
                return
        raise UserError(
            f"{self.step.name}: a grown entry is infinite where the source is finite: too large for {self.dtype} once scaled; store the "
            "result in float32 (dtype=float32), or choose a growth that scales less"
        )

    def _fill_all(self, target: np.ndarray, rows: np.ndarray) -> None:
        """Compute raw rows of these consecutive numbers, fill by fill."""
        fills, gains = self.maps[0].fill[rows], self.maps[0].gain[rows]
        if (fills == fills[0]).all() and (gains == gains[0]).all():
            self._fill(target, rows, Fill(int(fills[0])))
            return
        for fill in np.unique(fills):  # copies before means, which need them
            for chosen in _alike(fills == fill, gains):
                part = np.empty((int(chosen.sum()), target.shape[1]), target.dtype)
                self._fill(part, rows[chosen], Fill(int(fill)))
                target[chosen] = part

    def _fill(self, target: np.ndarray, rows: np.ndarray, fill: Fill) -> None:
        """Compute the rows of these numbers, which rise and have one fill."""
        index, gain = self.maps[0].index[rows], self.maps[0].gain[rows]
        if self.step.zero or (fill == Fill.ZERO and self.step.source is not None):
            target[...] = self._zero
        elif self.step.source is None or fill == Fill.RANDOM:
            target[...] = self._fresh("rows", rows, target.shape[1])
        elif fill == Fill.MEAN:
            row = self._mean_row if not self._holds_tokens else self._new_tokens(rows)
            self._expand_columns(target, row, row, gain, rows)
        else:
            own, following = self.step.source, self.step.next_source
            source = self._gather(own if fill == Fill.COPY else following, index)
            beside = self._gather(following, index) if following is not None and fill == Fill.COPY else source
            if self._has_mean_rows and fill == Fill.COPY and self._sums.rows == index[0]:
                self._sums.add(source[next(runs(index))])
            self._expand_columns(target, source, beside, gain, rows)
            if self.step.diagonal:
                self._keep_diagonal(target, rows)
            if self._noise is not None:
                self._noise.add(target, rows)
                if self._noise.closes:
                    close = self._close_columns if self._noise.axis == 1 else self._close_rows
                    close(target, rows, source, gain)

    # ---- the last copy of a split, where entries have 16 bits: what is left of the source, so that the sum is rounded once ----

    def _close_columns(self, target: np.ndarray, rows: np.ndarray, source: np.ndarray, gain: np.ndarray) -> None:
        """Set the last copies among the columns to the source's less the stored other copies."""
        noise, axis = self._noise, self.maps[1]
        assert noise is not None
        last = np.flatnonzero(noise.last)
        index = axis.index[last]
        factors = gain[:, None] * (axis.gain * axis.counts()[axis.index])[last]
        left = floats(np.ascontiguousarray(source[:, consecutive(index)]), self.dtype) * factors.astype(working_type(self.dtype))
        for places in noise.places:
            others = places[index]
            there = others >= 0
            with np.errstate(invalid="ignore"):  # infinities, where they are allowed
                left[:, consecutive(np.flatnonzero(there))] -= floats(np.ascontiguousarray(target[:, others[there]]), self.dtype)
        kept = target[:, consecutive(last)]
        target[:, consecutive(last)] = np.where(np.isfinite(left), to_raw(left, self.dtype), kept)

    def _close_rows(self, target: np.ndarray, rows: np.ndarray, source: np.ndarray, gain: np.ndarray) -> None:
        """Set the last copies among the rows to the source's less the other copies, computed again as they are stored."""
        noise, axis = self._noise, self.maps[0]
        assert noise is not None
        last = np.flatnonzero(noise.last[rows])
        if len(last) == 0:
            return
        index = axis.index[rows[last]]
        undivided = np.empty((len(last), target.shape[1]), target.dtype)
        self._expand_columns(undivided, source[last], source[last], gain[last] * axis.counts()[index], rows[last])
        left = floats(undivided, self.dtype)
        for places in noise.places:
            others = places[index]
            there = others >= 0
            stored = np.empty((int(there.sum()), target.shape[1]), target.dtype)
            if len(stored):
                self._fill(stored, others[there], Fill.COPY)
                with np.errstate(invalid="ignore"):
                    left[there] -= floats(stored, self.dtype)
        closed = np.isfinite(left) & (self.maps[1].fill != Fill.RANDOM)  # fresh ones are no copies of anything and stay
        target[last] = np.where(closed, to_raw(left, self.dtype), target[last])

    # ---- columns ----

    @cached_property
    def _fresh_columns(self) -> int:
        return int((self.maps[1].fill == Fill.RANDOM).sum())

    def _expand_columns(self, target: np.ndarray, source: np.ndarray, beside: np.ndarray, gain: np.ndarray, rows: np.ndarray) -> None:
        """Fill (b, N) raw target rows from (b or 1, n) raw source rows; `beside` are those of the next layer, `gain` one factor per row."""
        fresh = self._fresh("columns", rows, self._fresh_columns) if self._fresh_columns else None
        row_gain = float(gain[0]) if (gain == gain[0]).all() else gain[:, None]
        for piece in self.maps[1].pieces:
            where = piece.target
            part = where.of(target) if isinstance(where, Strips) else np.empty((len(target), len(where)), target.dtype)
            factor = row_gain * piece.gain
            if isinstance(factor, np.ndarray) and part.ndim == 3:
                factor = factor[:, None]
            if piece.like is not None:
                part[...] = piece.like.of(target)
            elif piece.fill == Fill.ZERO:
                part[...] = self._zero
            elif piece.fill == Fill.RANDOM:
                assert fresh is not None
                part[...] = piece.taken_from(fresh)
            elif piece.fill == Fill.MEAN:
                mean = floats(source, self.dtype).sum(axis=1, dtype=working_type(self.dtype)) / source.shape[1]
                part[...] = rounded(mean.reshape(-1, *[1] * (part.ndim - 1)), factor, self.dtype, self._offset)
            else:
                scaled(piece.taken_from(source if piece.fill == Fill.COPY else beside), factor, self.dtype, self._offset, part)
            if not isinstance(where, Strips):
                target[:, where] = part

    def _keep_diagonal(self, target: np.ndarray, rows: np.ndarray) -> None:
        """Let the n-th copies on the writing axis read the n-th copies only, undivided; both axes take copies in turn."""
        reading = self.step.tensor.reads.index(True)
        count = int(self.maps[reading].counts()[0])
        number, columns = (axis.number() for axis in self.maps)
        here = number[rows, None]
        met = here % count == columns[None] if reading else here == columns[None] % count
        target[...] = scaled(target, float(count), self.dtype) * met

    # ---- what is taken from the source ----

    def _gather(self, name: str | None, index: np.ndarray) -> np.ndarray:
        """(len(index), n) raw rows of the source tensor `name`, read stretch by stretch."""
        assert name is not None
        if len(self.step.shape) < 2:
            return self._in_dtype(name, self.reader.read(name).reshape(1, -1))
        read = [self.reader.read(name, int(index[run.start]), int(index[run.stop - 1]) + 1) for run in runs(index)]
        return self._in_dtype(name, read[0] if len(read) == 1 else np.concatenate(read))

    def _in_dtype(self, name: str, raw: np.ndarray) -> np.ndarray:
        """Raw bits of a source tensor in the format of the target, which is the same or a wider one."""
        stored = self.plan.source_dtype(name)
        return raw if stored == self.dtype else to_raw(floats(raw, stored), self.dtype)

    @cached_property
    def _root_mean_square(self) -> float:
        """Of the source; of a large one, of every eighth stretch of its rows."""
        rows, square, count = self.maps[0].source, 0.0, 0
        first, step = (0, STRETCH) if rows <= 1024 else (7 * STRETCH // 2, 8 * STRETCH)  # in the middle of what they stand for
        for start in range(first, rows, step):
            values = floats(self._gather(self.step.source, np.arange(start, min(start + STRETCH, rows))), self.dtype)
            strange = ~np.isfinite(values)  # where they are allowed, they say nothing of the others
            values[strange] = 0
            count += values.size - int(strange.sum())
            square += float(np.square(values, out=values).sum(axis=1).sum(dtype=np.float64))
        return sqrt(square / max(count, 1))

    @cached_property
    def _has_mean_rows(self) -> bool:
        return bool((self.maps[0].fill == Fill.MEAN).any())

    @cached_property
    def _sums(self) -> RowSum:
        return RowSum(self.maps[1].source, self.dtype)

    @cached_property
    def _mean_row(self) -> np.ndarray:
        """(1, n) the mean of all source rows, rounded to the stored dtype."""
        rows = self.maps[0].source
        for start in range(self._sums.rows, rows, STRETCH):  # those that were not among the rows so far
            self._sums.add(self._gather(self.step.source, np.arange(start, min(start + STRETCH, rows))))
        return to_raw(self._sums.total[None] / rows, self.dtype)

    @property
    def _holds_tokens(self) -> bool:
        """Whether rows are tokens, so that means among them are new ones."""
        return Space("vocab") in set(spaces(self.step.tensor.axes[0])) and len(self.step.shape) > 1

    def _new_tokens(self, rows: np.ndarray) -> np.ndarray:
        """(b, n) the mean row, for each new token with a little noise of its own, without which all would be one and the same."""
        if "tokens" not in self._draws:
            self._draws["tokens"] = Draws(self.maps[1].source, np.uint32, self.plan.growth.seed, self.step.name, "tokens")
        noise = normal(self._draws["tokens"].of(rows)) * (NEW_TOKENS * self._root_mean_square)
        return to_raw((floats(self._mean_row, self.dtype) + noise).astype(working_type(self.dtype)), self.dtype)

    @cached_property
    def _noise(self) -> Noise | None:
        """The noise on a matrix that reads copies."""
        quiet = self.step.tensor.is_head and not self.plan.recipe.noisy_head
        noisy = self.plan.noise and len(self.step.shape) > 1 and not quiet
        reads = [axis for axis in (0, 1) if self._reads_copies(axis)] if noisy else []
        if not reads:
            return None
        deviation = self.plan.noise * self._root_mean_square
        return Noise(reads[0], self.maps[reads[0]], self.matrix[1], deviation, self.dtype, self.plan.growth.seed, self.step.name)

    def _reads_copies(self, axis: int) -> bool:
        """Whether rows (0) or columns (1) are copies that are read, and none of them written, which would not sum to the source's."""
        last = len(self.step.maps) - 1
        copied = [number for number in (range(last) if axis == 0 else (last,)) if self.step.maps[number].counts().max() > 1]
        return bool(copied) and all(map(self.step.tensor.sums_over, copied))

    # ---- what is new ----

    @property
    def _offset(self) -> float:
        """What the module adds to the stored scale of a norm; nothing to its bias."""
        tensor = self.step.tensor
        return 0.0 if tensor.is_bias else tensor.line.offset

    @cached_property
    def _zero(self) -> np.ndarray:
        return self._constant(0.0)

    def _constant(self, value: float) -> np.ndarray:
        """A true value as it is stored."""
        return to_raw(np.full(1, value - self._offset), self.dtype)

    def _fresh(self, part: str, rows: np.ndarray, width: int) -> np.ndarray:
        """Fresh raw entries, as the library's class starts them: ones in norm scales, zeros in biases, else normal (`init_deviation`).

        They depend on seed, tensor, part and position alone.
        """
        tensor, start = self.step.tensor, self.plan.starts.get(self.step.name)
        if start is not None and start.places is not None:
            return self._placed(start.places, part, rows)
        if start is not None and len(start.quantiles) == 1:
            return np.broadcast_to(to_raw(start.quantiles, self.dtype), (len(rows), width))
        if start is None and (tensor.is_bias or tensor.line.kind.endswith("norm")):
            return np.broadcast_to(to_raw(np.zeros(1), self.dtype) if tensor.is_bias else self._constant(1.0), (len(rows), width))
        if part not in self._draws:
            kind = np.uint16 if is_short(self.dtype) else np.uint32
            self._draws[part] = Draws(width, kind, self.plan.growth.seed, self.step.name, part)
        draws = self._draws[part].of(rows)
        if start is not None and (start.normal is None or start.normal[0]):
            return self._drawn(start, draws)
        deviation = start.normal[1] if start is not None and start.normal else self._deviation
        if is_short(self.dtype):
            return lookup(normal_bits(deviation, self.dtype), draws)
        return to_raw((normal(draws) * deviation).astype(working_type(self.dtype)), self.dtype)

    @property
    def _deviation(self) -> float:
        return self.plan.family.init_deviation(self.plan.growth.target_config, self.step.tensor)

    def _placed(self, places: np.ndarray, part: str, rows: np.ndarray) -> np.ndarray:
        """Entries that the class gives by their place in the tensor."""
        entries = places.reshape(self.matrix)[rows]
        return to_raw(entries if part == "rows" else entries[:, self.maps[1].fill == Fill.RANDOM], self.dtype)

    def _drawn(self, start: Start, draws: np.ndarray) -> np.ndarray:
        """Entries of a distribution that is not normal around 0."""
        shares = (draws + 0.5) / 2.0 ** (8 * draws.itemsize)
        return to_raw(start.of(shares).astype(working_type(self.dtype)), self.dtype)


def _alike(rows: np.ndarray, gains: np.ndarray) -> list[np.ndarray]:
    """Marked rows by their gain, where there are few gains; a gain for all is faster than one for each."""
    few = np.unique(gains[rows])
    return [rows & (gains == gain) for gain in few] if len(few) <= 4 else [rows]
