"""Execution of a plan: source rows in, target rows out, one bounded block at a time.

The output is bit-identical for any block size, number of threads, and number of shards.

Shapes, one letter per dimension:
    m, n: rows and columns of a source tensor, seen as a matrix (all axes but the last count rows together)
    M, N: rows and columns of the target tensor
    r: rows of the source that are read at a time
    b: rows of one block of the target
    s, w: strips of columns that repeat, and the columns of each

Words: *raw* arrays hold the stored bits as unsigned integers; the *working type* is the floating-point type
in which they are computed (float32 for 16-bit formats), so a 16-bit result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import prod, sqrt
from typing import Protocol

import numpy as np

from outgrow.growth.decision import Finish, Step
from outgrow.growth.engine.bits import (
    EXPONENT,
    accumulate,
    all_finite,
    finite_mean,
    floats,
    lookup,
    normal_bits,
    rounded,
    scaled,
)
from outgrow.growth.engine.noise import Noise
from outgrow.growth.engine.runs import Strips, consecutive, runs
from outgrow.growth.engine.seeding import Draws, normal
from outgrow.growth.expansion import AxisMap, Fill, product
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.dtypes import RAW, is_short, to_raw, working_type
from outgrow.model.notation import Space, spaces
from outgrow.model.starts import Start

BLOCK_BYTES = 1 << 21  # of the target: temporaries stay in the processor's cache, and their memory is reused
NEW_TOKENS = 1e-3  # deviation of new tokens from the mean token, relative to the rows' root mean square
STRETCH = 32  # source rows that are summed in the working type before their sum is added up in float64


class Reader(Protocol):
    """A place that source tensors come from: a checkpoint on disk, or tensors in memory."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows `start:stop` of a tensor as raw bits, into an array that the caller may write to.

        Returns:
            (r, n), where all axes but the last count rows together; of a vector, its entries.
        """


class RowSum:
    """A running sum of rows that arrive in order, some at a time.

    Each stretch of rows is summed in the working type, the stretches in float64: the total does not depend on
    how many rows arrive together.

    Attributes:
        rows: number of rows added so far.
    """

    def __init__(self, columns: int, dtype: str) -> None:
        self.rows = 0
        self.dtype = dtype
        working = working_type(dtype)
        self._stretch = np.zeros(columns, working)
        self._stretches = np.zeros(columns)

    def add(self, raw: np.ndarray) -> None:
        """Add the next rows, as raw bits: (r, n)."""
        done = 0
        while done < len(raw):
            missing = STRETCH - self.rows % STRETCH
            part = raw[done : done + missing]
            accumulate(part, self._stretch, self.dtype)
            done += len(part)
            self.rows += len(part)
            if self.rows % STRETCH == 0:
                self._stretches += self._stretch
                self._stretch[:] = 0

    @property
    def total(self) -> np.ndarray:
        """(n,) the sum, float64."""
        return self._stretches + self._stretch


@dataclass(frozen=True, eq=False)
class Expander:
    """The computation of one target tensor, block of rows by block of rows, in one thread at a time.

    A vector is treated as a matrix of one row; of more than two axes all but the last count rows together, so
    that a block stays small however large a model's experts are. The reading axis grows before the writing
    axis: the mean row of a writer is like one more source row.
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
        """(M, N) of the target."""
        shape = self.step.shape
        if len(shape) < 2:
            return 1, prod(shape)
        rows = prod(shape[:-1])
        return rows, shape[-1]

    @cached_property
    def maps(self) -> tuple[AxisMap, AxisMap]:
        """The maps of the rows (m → M) and of the columns (n → N)."""
        maps = self.step.maps
        if len(maps) > 1:
            rows = reduce(product, maps[:-1])
            return rows, maps[-1]
        unit = AxisMap.identity(1)
        columns = maps[0] if maps else unit
        return unit, columns

    @property
    def is_blank(self) -> bool:
        """Check whether all bits of the tensor are zero."""
        return self.step.zero and not self._zero.any()

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (first row, row after the last) of consecutive blocks."""
        rows, columns = self.matrix
        entry_bytes = RAW[self.dtype].itemsize
        row_bytes = columns * entry_bytes
        height = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            yield start, stop

    def complete(self) -> np.ndarray:
        """Compute the complete tensor, raw, in its own shape."""
        stored_type = RAW[self.dtype]
        target = np.empty(self.matrix, stored_type)
        for start, stop in self.blocks():
            block = target[start:stop]
            self.fill(block, start)
        return target.reshape(self.step.shape)

    def fill(self, target: np.ndarray, start: int) -> None:
        """Compute raw rows `start`, `start + 1`, … into `target`, one of the `blocks`: (b, N)."""
        stop = start + len(target)
        rows = np.arange(start, stop)
        self._fill_all(target, rows)
        self._finish(target, rows)
        may_overflow = self.dtype in EXPONENT
        if may_overflow and not all_finite(target, self.dtype):
            self._check_source(rows)

    def _check_source(self, rows: np.ndarray) -> None:
        """Accept target rows that are not finite where the source rows are not finite either.

        Raises:
            UserError: the source is finite, so that scaling or noise overflowed the stored format.
        """
        row_map = self.maps[0]
        fills = row_map.fill[rows]
        is_copied = fills != Fill.MEAN
        # A mean row depends on every source row, a copy on one.
        index = np.arange(row_map.source)
        if is_copied.all():
            copied_from = row_map.index[rows]
            index = np.unique(copied_from)
        step = self.step
        sources = {step.source, step.next_source, step.beside}
        for name in sources - {None}:
            gathered = self._gather(name, index)
            source = np.ascontiguousarray(gathered)
            if not all_finite(source, self.dtype):
                return
        raise UserError(
            f"{self.step.name}: a grown entry is infinite where the source is finite: too large for "
            f"{self.dtype} once scaled; store the result in float32 (dtype=float32), or choose a growth that "
            "scales less"
        )

    def _fill_all(self, target: np.ndarray, rows: np.ndarray) -> None:
        """Compute raw rows of these consecutive numbers, one fill and gain at a time."""
        row_map = self.maps[0]
        fills = row_map.fill[rows]
        gains = row_map.gain[rows]
        same_fill = (fills == fills[0]).all()
        same_gain = (gains == gains[0]).all()
        if same_fill and same_gain:
            fill = Fill(int(fills[0]))
            self._fill(target, rows, fill)
            return
        # In the order of `Fill`: copies before means, since the mean row is summed up from the rows copied.
        width = target.shape[1]
        for number in np.unique(fills).tolist():
            fill = Fill(number)
            for chosen in _alike(fills == fill, gains):
                numbers = rows[chosen]
                shape = (len(numbers), width)
                part = np.empty(shape, target.dtype)
                self._fill(part, numbers, fill)
                target[chosen] = part

    def _fill(self, target: np.ndarray, rows: np.ndarray, fill: Fill) -> None:
        """Compute the rows of these ascending numbers, which share one fill."""
        has_source = self.step.source is not None
        is_fresh = fill == Fill.RANDOM or not has_source
        is_empty = fill == Fill.ZERO and has_source
        if self.step.zero or is_empty:
            target[...] = self._zero
        elif is_fresh:
            width = target.shape[1]
            target[...] = self._fresh("rows", rows, width)
        elif fill == Fill.MEAN:
            row = self._new_tokens(rows) if self._holds_tokens else self._mean_row
            gain = self.maps[0].gain[rows]
            self._expand_columns(target, row, row, gain, rows)
        else:
            self._copy(target, rows, fill)

    def _copy(self, target: np.ndarray, rows: np.ndarray, fill: Fill) -> None:
        """Compute rows that copy source rows, of the layer itself (COPY) or of the next layer (NEXT)."""
        own = self.step.source
        following = self.step.next_source
        is_own = fill == Fill.COPY
        row_map = self.maps[0]
        index = row_map.index[rows]
        gain = row_map.gain[rows]
        copied_from = own if is_own else following
        source = self._gather(copied_from, index)
        next_rows = source
        if is_own and following is not None:
            next_rows = self._gather(following, index)
        # Rows that come next in the mean are added to it now, while they are in the cache.
        counts_in_mean = is_own and self._has_mean_rows
        if counts_in_mean and self._sums.rows == index[0]:
            first_run = next(runs(index))
            self._sums.add(source[first_run])
        self._expand_columns(target, source, next_rows, gain, rows)
        if self.step.diagonal:
            self._keep_diagonal(target, rows)
        if self._noise is None:
            return
        self._noise.add(target, rows)
        if self._noise.closes:
            over_columns = self._noise.axis == 1
            close = self._close_columns if over_columns else self._close_rows
            close(target, rows, source, gain)

    @cached_property
    def _working(self) -> type[np.floating]:
        """The floating-point type in which the tensor is computed."""
        return working_type(self.dtype)

    # ---- the last copy of a split in 16 bits: source minus the stored others, so their sum rounds once ----

    def _close_columns(
        self, target: np.ndarray, rows: np.ndarray, source: np.ndarray, gain: np.ndarray
    ) -> None:
        """Set the last copies among the columns to the source minus the other copies as stored."""
        noise = self._noise
        columns = self.maps[1]
        assert noise is not None
        last = np.flatnonzero(noise.last)
        index = columns.index[last]
        # Start from the undivided source: the gain of a copy times the number of copies.
        counts = columns.counts()
        copies = counts[columns.index]
        undivided = columns.gain * copies
        row_gain = gain[:, None]
        factors = row_gain * undivided[last]
        factors = factors.astype(self._working)
        run = consecutive(index)
        copied = np.ascontiguousarray(source[:, run])
        remainder = self._decoded(copied) * factors
        # Subtract every other copy, as rounded and stored.
        for places in noise.places:
            others = places[index]
            present = others >= 0
            other_columns = others[present]
            other_copies = np.ascontiguousarray(target[:, other_columns])
            stored = self._decoded(other_copies)
            copied_here = consecutive(np.flatnonzero(present))
            with np.errstate(invalid="ignore"):  # infinities, where they are allowed
                remainder[:, copied_here] -= stored
        last_columns = consecutive(last)
        as_before = target[:, last_columns]
        is_finite = np.isfinite(remainder)
        closed = self._encoded(remainder)
        target[:, last_columns] = np.where(is_finite, closed, as_before)

    def _close_rows(self, target: np.ndarray, rows: np.ndarray, source: np.ndarray, gain: np.ndarray) -> None:
        """Set the last copies among the rows to the source minus the others, computed again as stored."""
        noise = self._noise
        row_map = self.maps[0]
        assert noise is not None
        is_last = noise.last[rows]
        last = np.flatnonzero(is_last)
        if len(last) == 0:
            return
        # Start from the undivided source rows, expanded along the columns.
        last_rows = rows[last]
        index = row_map.index[last_rows]
        width = target.shape[1]
        shape = (len(last), width)
        undivided = np.empty(shape, target.dtype)
        counts = row_map.counts()
        factor = gain[last] * counts[index]
        last_source = source[last]
        self._expand_columns(undivided, last_source, last_source, factor, last_rows)
        remainder = self._decoded(undivided)
        # Subtract every other copy, as rounded and stored.
        for places in noise.places:
            others = places[index]
            present = others >= 0
            other_rows = others[present]
            shape = (len(other_rows), width)
            stored = np.empty(shape, target.dtype)
            if len(other_rows):
                self._fill(stored, other_rows, Fill.COPY)
                with np.errstate(invalid="ignore"):
                    remainder[present] -= self._decoded(stored)
        # Fresh columns are no copies of anything and stay.
        column_fills = self.maps[1].fill
        is_copied = column_fills != Fill.RANDOM
        is_closed = np.isfinite(remainder) & is_copied
        closed = self._encoded(remainder)
        as_before = target[last]
        target[last] = np.where(is_closed, closed, as_before)

    # ---- columns ----

    @cached_property
    def _fresh_columns(self) -> int:
        column_fills = self.maps[1].fill
        is_fresh = column_fills == Fill.RANDOM
        return int(is_fresh.sum())

    def _expand_columns(
        self,
        target: np.ndarray,
        source: np.ndarray,
        next_rows: np.ndarray,
        gain: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        """Fill raw target rows from raw source rows: (b or 1, n) → (b, N).

        Args:
            next_rows: the same rows of the next source layer.
            gain: (b,) one factor per row.
            rows: (b,) the numbers of the target rows.
        """
        fresh = None
        if self._fresh_columns:
            fresh = self._fresh("columns", rows, self._fresh_columns)
        # One factor for all rows is faster than one per row.
        row_gain: float | np.ndarray = gain[:, None]
        first_gain = gain[0]
        if (gain == first_gain).all():
            row_gain = float(first_gain)
        for piece in self.maps[1].pieces:
            where = piece.target
            part = _columns(target, where)
            factor = row_gain * piece.gain
            in_strips = part.ndim == 3
            if isinstance(factor, np.ndarray) and in_strips:
                factor = factor[:, None]
            if piece.like is not None:
                part[...] = piece.like.of(target)
            elif piece.fill == Fill.ZERO:
                part[...] = self._zero
            elif piece.fill == Fill.RANDOM:
                assert fresh is not None
                part[...] = piece.taken_from(fresh)
            elif piece.fill == Fill.MEAN:
                part[...] = self._mean_column(source, factor, part.ndim)
            else:
                is_own = piece.fill == Fill.COPY
                stored = source if is_own else next_rows
                copied = piece.taken_from(stored)
                scaled(copied, factor, self.dtype, self._offset, part)
            if not isinstance(where, Strips):
                target[:, where] = part

    def _mean_column(self, source: np.ndarray, factor: float | np.ndarray, ndim: int) -> np.ndarray:
        """Average all columns of raw source rows, times `factor`, raw: (b, n) → (b, 1) or (b, 1, 1)."""
        values = self._decoded(source)
        total = values.sum(axis=1, dtype=self._working)
        mean = total / source.shape[1]
        strange = ~np.isfinite(mean)
        if strange.any():
            strange_rows = values[strange]
            mean[strange] = finite_mean(strange_rows, axis=1)
        further_axes = [1] * (ndim - 1)
        mean = mean.reshape(-1, *further_axes)
        return rounded(mean, factor, self.dtype, self._offset)

    def _keep_diagonal(self, target: np.ndarray, rows: np.ndarray) -> None:
        """Let the n-th copies on the writing axis read the n-th copies alone, undivided.

        Both axes take copies in turn, so an entry is kept where the copy numbers of its row and column agree.
        """
        reading = self.step.tensor.reads.index(True)
        copies = self.maps[reading].counts()
        count = int(copies[0])
        row_map, column_map = self.maps
        by_row = row_map.number()[rows, None]
        by_column = column_map.number()[None]
        if reading:
            by_row = by_row % count
        else:
            by_column = by_column % count
        kept = by_row == by_column
        undivided = scaled(target, float(count), self.dtype)
        target[...] = undivided * kept

    # ---- values taken from the source ----

    def _decoded(self, raw: np.ndarray) -> np.ndarray:
        """Decode raw bits into numbers of the working type (exact)."""
        return floats(raw, self.dtype)

    def _encoded(self, values: np.ndarray) -> np.ndarray:
        """Round numbers to the stored format, as raw bits."""
        return to_raw(values, self.dtype)

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        """Round float64 numbers to the working type and from there to the stored format, as raw bits."""
        working = values.astype(self._working)
        return self._encoded(working)

    def _gather(self, name: str | None, index: np.ndarray) -> np.ndarray:
        """Raw rows of the source tensor `name`, averaged with those beside it: (len(index), n)."""
        assert name is not None
        rows = self._rows(name, index)
        beside = self.step.beside
        if beside is None or name != self.step.source:
            return rows
        rows_beside = self._rows(beside, index)
        own = self._decoded(np.ascontiguousarray(rows))
        other = self._decoded(np.ascontiguousarray(rows_beside))
        return self._encoded(0.5 * own + 0.5 * other)

    def _rows(self, name: str, index: np.ndarray) -> np.ndarray:
        """Read raw rows of the source tensor `name`, one read per run of rows: (len(index), n)."""
        if len(self.step.shape) < 2:
            vector = self.reader.read(name)
            one_row = vector.reshape(1, -1)
            return self._in_dtype(name, one_row)
        parts = []
        for run in runs(index):
            first = int(index[run.start])
            count = run.stop - run.start
            part = self.reader.read(name, first, first + count)
            parts.append(part)
        only_run = len(parts) == 1
        rows = parts[0] if only_run else np.concatenate(parts)
        return self._in_dtype(name, rows)

    def _in_dtype(self, name: str, raw: np.ndarray) -> np.ndarray:
        """Convert raw bits of a source tensor to the target's format, which is the same or a wider one."""
        stored = self.plan.source_dtype(name)
        if stored == self.dtype:
            return raw
        values = floats(raw, stored)
        return self._encoded(values)

    @cached_property
    def _root_mean_square(self) -> float:
        """Root mean square of the source; of more than 1,024 rows, of every eighth stretch."""
        rows = self.maps[0].source
        square, count = 0.0, 0
        # A stretch that stands for eight lies in the middle of them.
        first, step = 0, STRETCH
        if rows > 1024:
            step = 8 * STRETCH
            first = 7 * STRETCH // 2
        for start in range(first, rows, step):
            stop = min(start + STRETCH, rows)
            rows_between = np.arange(start, stop)
            stretch = self._gather(self.step.source, rows_between)
            values = self._decoded(stretch)
            infinite = ~np.isfinite(values)  # where they are allowed, they say nothing of the others
            values[infinite] = 0
            count += values.size - int(infinite.sum())
            squares = np.square(values, out=values)
            by_row = squares.sum(axis=1)
            square += float(by_row.sum(dtype=np.float64))
        mean_square = square / max(count, 1)
        return sqrt(mean_square)

    @cached_property
    def _has_mean_rows(self) -> bool:
        row_fills = self.maps[0].fill
        is_mean = row_fills == Fill.MEAN
        return bool(is_mean.any())

    @cached_property
    def _sums(self) -> RowSum:
        columns = self.maps[1].source
        return RowSum(columns, self.dtype)

    @cached_property
    def _mean_row(self) -> np.ndarray:
        """(1, n) the mean of all source rows, raw, rounded to the stored format.

        Of a column with entries that are not finite, where that is allowed, it is the mean of the others.
        """
        rows = self.maps[0].source
        for start in range(self._sums.rows, rows, STRETCH):  # those that no copied row has added yet
            stop = min(start + STRETCH, rows)
            rows_between = np.arange(start, stop)
            stretch = self._gather(self.step.source, rows_between)
            self._sums.add(stretch)
        mean = self._sums.total / rows
        strange = np.flatnonzero(~np.isfinite(mean))
        if len(strange):
            index = np.arange(rows)
            every_row = self._gather(self.step.source, index)
            values = self._decoded(every_row)
            strange_columns = values[:, strange]
            mean[strange] = finite_mean(strange_columns, axis=0)
        one_row = mean[None]
        return self._encoded(one_row)

    @property
    def _holds_tokens(self) -> bool:
        """Check whether rows are tokens, so that mean rows are new tokens."""
        axis = self.step.tensor.axes[0]
        row_spaces = set(spaces(axis))
        is_matrix = len(self.step.shape) > 1
        return is_matrix and Space("vocab") in row_spaces

    def _new_tokens(self, rows: np.ndarray) -> np.ndarray:
        """(b, n) the mean row, with a little noise for each new token so that no two are the same."""
        deviation = NEW_TOKENS * self._root_mean_square
        columns = self.maps[1].source
        numbers = self._numbers("tokens", columns, rows)
        noise = normal(numbers) * deviation
        mean_row = self._decoded(self._mean_row)
        return self._rounded(mean_row + noise)

    @cached_property
    def _noise(self) -> Noise | None:
        """The noise on a matrix that reads copies; None without noise, or where no copies are read."""
        tensor = self.step.tensor
        is_quiet = tensor.is_head and not self.plan.recipe.noisy_head
        is_vector = len(self.step.shape) < 2
        if is_quiet or is_vector or not self.plan.noise:
            return None
        axis = next(filter(self._reads_copies, (0, 1)), None)
        if axis is None:
            return None
        deviation = self.plan.noise * self._root_mean_square
        seed = self.plan.growth.seed
        name = self.step.name
        columns = self.matrix[1]
        axis_map = self.maps[axis]
        return Noise(axis, axis_map, columns, deviation, self.dtype, seed, name)

    def _reads_copies(self, axis: int) -> bool:
        """Check whether rows (0) or columns (1) are copies that are read.

        None of them may be written: written copies do not sum to the source.
        """
        maps = self.step.maps
        last = len(maps) - 1
        axes = range(last) if axis == 0 else (last,)
        copied = [dim for dim in axes if maps[dim].repeats]
        sums_over = self.step.tensor.sums_over
        return bool(copied) and all(map(sums_over, copied))

    # ---- what a step's `finish` asks for beyond its maps (experts of a mixture) ----

    def _finish(self, target: np.ndarray, rows: np.ndarray) -> None:
        """Draw some entries anew and add noise to copies, where the step says so, in raw rows of these
        numbers.
        """
        finish = self.step.finish
        if self.step.zero or finish is None:
            return
        if not finish.changes_copies:
            return
        if finish.redrawn is not None:
            self._redraw(target, rows, *finish.redrawn)
        width = target.shape[1]
        if finish.noise:
            spread = finish.noise * self._root_mean_square
            numbers = self._numbers("spread", width, rows)
            noise = normal(numbers) * spread
            self._add(target, noise)
        if finish.jitter:
            copy_numbers = self.maps[0].number()
            further = np.flatnonzero(copy_numbers[rows])
            if len(further):
                part = target[further]
                numbers = self._numbers("jitter", width, rows[further])
                shares = numbers / (1 << 32)
                centred = 2 * shares - 1
                self._add(part, centred * finish.jitter)
                target[further] = part

    def _redraw(self, target: np.ndarray, rows: np.ndarray, axis: int, indices: np.ndarray) -> None:
        """Draw the rows (0) or columns (1) of these indices anew."""
        mean, deviation = self._redrawn_moments
        if axis == 0:
            is_redrawn = np.isin(rows, indices)
            redrawn_rows = np.flatnonzero(is_redrawn)
            width = target.shape[1]
            numbers = self._numbers("redrawn", width, rows[redrawn_rows])
            entries = self._normal_entries(numbers, mean, deviation)
            target[redrawn_rows] = entries
        else:
            numbers = self._numbers("redrawn", len(indices), rows)
            entries = self._normal_entries(numbers, mean, deviation)
            target[:, indices] = entries

    def _normal_entries(self, numbers: np.ndarray, mean: float, deviation: float) -> np.ndarray:
        """Turn 32-bit numbers into raw entries of a normal distribution."""
        standard = normal(numbers)
        return self._rounded(standard * deviation + mean)

    @cached_property
    def _redrawn_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the entries that are drawn anew, as they would have been without."""
        assert self.step.finish is not None
        assert self.step.finish.redrawn is not None
        axis, indices = self.step.finish.redrawn
        count, total, square = 0, 0.0, 0.0
        for start, stop in self.blocks():
            rows = np.arange(start, stop)
            shape = (len(rows), self.matrix[1])
            block = np.empty(shape, RAW[self.dtype])
            self._fill_all(block, rows)
            is_replaced = np.isin(rows, indices)
            replaced = block[:, indices] if axis else block[is_replaced]
            values = self._decoded(np.ascontiguousarray(replaced))
            values = values.astype(np.float64)
            finite = np.isfinite(values)
            if not finite.all():  # where that is allowed
                values = values[finite]
            count += values.size
            total += float(values.sum())
            square += float(np.square(values).sum())
        count = max(count, 1)
        mean = total / count
        variance = max(square / count - mean**2, 0.0)
        return mean, sqrt(variance)

    def _numbers(self, part: str, width: int, rows: np.ndarray) -> np.ndarray:
        """(len(rows), width) random 32-bit numbers that depend on seed, tensor, part and position alone."""
        stream = self._stream(part, width, np.uint32)
        return stream.of(rows)

    def _stream(self, part: str, width: int, kind: type[np.unsignedinteger]) -> Draws:
        """Random integers of one part of the tensor, row by row; the same stream at every call."""
        if part not in self._draws:
            seed = self.plan.growth.seed
            name = self.step.name
            self._draws[part] = Draws(width, kind, seed, name, part)
        return self._draws[part]

    def _add(self, target: np.ndarray, values: np.ndarray) -> None:
        """Add numbers to raw entries."""
        before = self._decoded(target)
        target[...] = self._rounded(before + values)

    # ---- fresh values ----

    @property
    def _offset(self) -> float:
        """The number that the module adds to the stored scale of a norm (not to its bias)."""
        tensor = self.step.tensor
        return 0.0 if tensor.is_bias else tensor.line.offset

    @cached_property
    def _zero(self) -> np.ndarray:
        return self._constant(0.0)

    def _constant(self, value: float) -> np.ndarray:
        """Encode a true value as it is stored."""
        stored_value = value - self._offset
        stored = np.full(1, stored_value)
        return self._encoded(stored)

    def _fresh(self, part: str, rows: np.ndarray, width: int) -> np.ndarray:
        """Initialise raw entries as the library's class does: norm scales 1, biases 0, else normal, where the
        plan says so at the source's root mean square.

        They depend on seed, tensor, part ("rows" or "columns") and position alone: (b, width).
        """
        tensor = self.step.tensor
        start = self.plan.starts.get(self.step.name)
        if start is not None and start.places is not None:
            return self._placed(start.places, part, rows)
        shape = (len(rows), width)
        if start is not None and len(start.quantiles) == 1:
            constant = self._encoded(start.quantiles)
            return np.broadcast_to(constant, shape)
        is_norm = tensor.line.kind.endswith("norm")
        if start is None and (tensor.is_bias or is_norm):
            value = 0.0 if tensor.is_bias else 1.0
            return np.broadcast_to(self._constant(value), shape)
        kind = np.uint16 if is_short(self.dtype) else np.uint32
        finish = self.step.finish or Finish()
        alike = rows // finish.alike
        stream = self._stream(part, width, kind)
        draws = stream.of(alike)
        deviation = finish.deviation
        if deviation is None and start is not None:
            mean, deviation = start.normal or (None, None)
            if mean != 0:  # not a normal distribution around zero
                return self._drawn(start, draws)
        if deviation is None:
            deviation = self._deviation
        may_match = self.plan.fresh == "match" and self.step.source is not None
        if may_match and finish.deviation is None:
            deviation = self._root_mean_square or deviation
        if is_short(self.dtype):
            table = normal_bits(deviation, self.dtype)
            return lookup(table, draws)
        return self._rounded(normal(draws) * deviation)

    @property
    def _deviation(self) -> float:
        config = self.plan.growth.target_config
        return self.plan.family.init_deviation(config, self.step.tensor)

    def _placed(self, places: np.ndarray, part: str, rows: np.ndarray) -> np.ndarray:
        """Encode entries that the class gives by their place in the tensor: (b, width)."""
        entries = places.reshape(self.matrix)[rows]
        if part == "columns":
            column_fills = self.maps[1].fill
            is_fresh = column_fills == Fill.RANDOM
            entries = entries[:, is_fresh]
        return self._encoded(entries)

    def _drawn(self, start: Start, draws: np.ndarray) -> np.ndarray:
        """Turn random integers into entries of a distribution that is not normal around 0."""
        bits = 8 * draws.itemsize
        shares = (draws + 0.5) / 2.0**bits
        values = start.of(shares)
        return self._rounded(values)


def _columns(target: np.ndarray, where: Strips | np.ndarray) -> np.ndarray:
    """The columns of a piece, to be written: of strips a view of the target, (b, w) or (b, s, w); of
    scattered columns an array of their own, (b, len(where)), which is copied to its place last.
    """
    if isinstance(where, Strips):
        return where.of(target)
    shape = (len(target), len(where))
    return np.empty(shape, target.dtype)


def _alike(rows: np.ndarray, gains: np.ndarray) -> list[np.ndarray]:
    """Group marked rows by gain where there are few gains: one factor for all is faster than one per row."""
    marked_gains = gains[rows]
    distinct = np.unique(marked_gains)
    if len(distinct) > 4:
        return [rows]
    return [rows & (gains == gain) for gain in distinct]
