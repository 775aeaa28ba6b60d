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
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod, sqrt

import numpy as np

from outgrow.growth.decision import Step
from outgrow.growth.engine.bits import EXPONENT, all_finite, finite_mean, rounded, scaled
from outgrow.growth.engine.fresh import Fresh
from outgrow.growth.engine.noise import Noise
from outgrow.growth.engine.rows import Format, Reader, SourceRows
from outgrow.growth.engine.runs import Strips, runs
from outgrow.growth.engine.seeding import normal
from outgrow.growth.expansion import AxisMap, Fill, product
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.dtypes import RAW
from outgrow.model.notation import Space, spaces

BLOCK_BYTES = 1 << 21  # of the target: temporaries stay in the processor's cache, and their memory is reused
NEW_TOKENS = 1e-3  # deviation of new tokens from the mean token, relative to the rows' root mean square


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

    @cached_property
    def dtype(self) -> str:
        return self.plan.dtype(self.step)

    @cached_property
    def format(self) -> Format:
        return Format(self.dtype)

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
    def row_map(self) -> AxisMap:
        return self.maps[0]

    @property
    def column_map(self) -> AxisMap:
        return self.maps[1]

    @property
    def width(self) -> int:
        """N, the number of columns of the target."""
        return self.matrix[1]

    @cached_property
    def _source(self) -> SourceRows:
        row_map, column_map = self.maps
        return SourceRows(self.plan, self.step, self.reader, self.format, row_map.source, column_map.source)

    @cached_property
    def _fresh(self) -> Fresh:
        return Fresh(self.plan, self.step, self.format, self.matrix, self.column_map, self._source)

    def _empty(self, rows: int) -> np.ndarray:
        """An array for so many raw rows of the target."""
        shape = (rows, self.width)
        return np.empty(shape, RAW[self.dtype])

    @property
    def is_blank(self) -> bool:
        """Check whether all bits of the tensor are zero."""
        return self.step.zero and not self._fresh.zero.any()

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
        target = self._empty(self.matrix[0])
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
        row_map = self.row_map
        fills = row_map.fill[rows]
        is_copied = fills != Fill.MEAN
        # A mean row depends on every source row, a copy on one.
        index = np.arange(row_map.source)
        if is_copied.all():
            copied_from = row_map.index[rows]
            index = np.unique(copied_from)
        step = self.step
        named = (step.source, step.next_source, step.beside)
        for name in set(named) - {None}:
            gathered = self._source.gather(name, index)
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
        row_map = self.row_map
        fills = row_map.fill[rows]
        gains = row_map.gain[rows]
        same_fill = (fills == fills[0]).all()
        same_gain = (gains == gains[0]).all()
        if same_fill and same_gain:
            fill = Fill(int(fills[0]))
            self._fill(target, rows, fill)
            return
        # In the order of `Fill`: copies before means, since the mean row is summed up from the rows copied.
        distinct = np.unique(fills)
        for fill in map(Fill, distinct.tolist()):
            has_fill = fills == fill
            for chosen in _alike(has_fill, gains):
                numbers = rows[chosen]
                part = self._empty(len(numbers))
                self._fill(part, numbers, fill)
                target[chosen] = part

    def _fill(self, target: np.ndarray, rows: np.ndarray, fill: Fill) -> None:
        """Compute the rows of these ascending numbers, which share one fill."""
        has_source = self.step.source is not None
        is_fresh = fill == Fill.RANDOM or not has_source
        is_empty = fill == Fill.ZERO and has_source
        if self.step.zero or is_empty:
            target[...] = self._fresh.zero
        elif is_fresh:
            target[...] = self._fresh.entries("rows", rows, self.width)
        elif fill == Fill.MEAN:
            row_map = self.row_map
            gain = row_map.gain[rows]
            row = self._new_tokens(rows) if self._holds_tokens else self._source.mean
            self._expand_columns(target, row, row, gain, rows)
        else:
            self._copy(target, rows, fill)

    def _copy(self, target: np.ndarray, rows: np.ndarray, fill: Fill) -> None:
        """Compute rows that copy source rows, of the layer itself (COPY) or of the next layer (NEXT)."""
        own = self.step.source
        following = self.step.next_source
        is_own = fill == Fill.COPY
        row_map = self.row_map
        index = row_map.index[rows]
        gain = row_map.gain[rows]
        gather = self._source.gather
        copied_from = own if is_own else following
        source = gather(copied_from, index)
        next_rows = source
        if is_own and following is not None:
            next_rows = gather(following, index)
        if is_own and self._has_mean_rows:
            self._add_to_mean(source, index)
        self._expand_columns(target, source, next_rows, gain, rows)
        if self.step.diagonal:
            self._keep_diagonal(target, rows)
        noise = self._noise
        if noise is None:
            return
        noise.add(target, rows)
        if not noise.closes:
            return
        if noise.axis == 1:
            noise.close_columns(target, source, gain)
        else:
            self._close_rows(noise, target, rows, source, gain)

    @cached_property
    def _has_mean_rows(self) -> bool:
        row_fills = self.row_map.fill
        is_mean = row_fills == Fill.MEAN
        return bool(is_mean.any())

    def _add_to_mean(self, source: np.ndarray, index: np.ndarray) -> None:
        """Add rows that come next in the mean now, while they are in the cache."""
        sums = self._source.sums
        if sums.rows == index[0]:
            first_run = next(runs(index))
            sums.add(source[first_run])

    def _close_rows(
        self, noise: Noise, target: np.ndarray, rows: np.ndarray, source: np.ndarray, gain: np.ndarray
    ) -> None:
        """Set the last copies among the rows to the source minus the others, computed again as stored."""
        is_last = noise.last[rows]
        last = np.flatnonzero(is_last)
        if len(last) == 0:
            return
        # Start from the undivided source rows, expanded along the columns.
        row_map = self.row_map
        last_rows = rows[last]
        index = row_map.index[last_rows]
        undivided = self._empty(len(last))
        counts = row_map.counts()
        copies = counts[index]
        factor = gain[last] * copies
        last_source = source[last]
        self._expand_columns(undivided, last_source, last_source, factor, last_rows)
        remainder = self.format.decoded(undivided)
        # Subtract every other copy, as rounded and stored.
        for places in noise.places:
            others = places[index]
            present = others >= 0
            other_rows = others[present]
            if len(other_rows):
                raw = self._empty(len(other_rows))
                self._fill(raw, other_rows, Fill.COPY)
                stored = self.format.decoded(raw)
                with np.errstate(invalid="ignore"):
                    remainder[present] -= stored
        # Fresh columns are no copies of anything and stay.
        is_copied = ~self._fresh.columns
        is_finite = np.isfinite(remainder)
        is_closed = is_finite & is_copied
        closed = self.format.encoded(remainder)
        as_before = target[last]
        target[last] = np.where(is_closed, closed, as_before)

    # ---- columns ----

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
        fresh_count = self._fresh.column_count
        if fresh_count:
            fresh = self._fresh.entries("columns", rows, fresh_count)
        # One factor for all rows is faster than one per row.
        row_gain: float | np.ndarray = gain[:, None]
        first_gain = gain[0]
        if (gain == first_gain).all():
            row_gain = float(first_gain)
        for piece in self.column_map.pieces:
            where = piece.target
            part = _columns(target, where)
            factor = row_gain * piece.gain
            in_strips = part.ndim == 3
            if isinstance(factor, np.ndarray) and in_strips:
                factor = factor[:, None]
            if piece.like is not None:
                part[...] = piece.like.of(target)
            elif piece.fill == Fill.ZERO:
                part[...] = self._fresh.zero
            elif piece.fill == Fill.RANDOM:
                assert fresh is not None
                part[...] = piece.taken_from(fresh)
            elif piece.fill == Fill.MEAN:
                part[...] = self._mean_column(source, factor, part.ndim)
            else:
                is_own = piece.fill == Fill.COPY
                stored = source if is_own else next_rows
                copied = piece.taken_from(stored)
                scaled(copied, factor, self.dtype, self._fresh.offset, part)
            if not isinstance(where, Strips):
                target[:, where] = part

    def _mean_column(self, source: np.ndarray, factor: float | np.ndarray, ndim: int) -> np.ndarray:
        """Average all columns of raw source rows, times `factor`, raw: (b, n) → (b, 1) or (b, 1, 1)."""
        values = self.format.decoded(source)
        columns = source.shape[1]
        total = values.sum(axis=1, dtype=self.format.working)
        mean = total / columns
        is_finite = np.isfinite(mean)
        strange = ~is_finite
        if strange.any():
            strange_rows = values[strange]
            mean[strange] = finite_mean(strange_rows, axis=1)
        further_axes = [1] * (ndim - 1)
        mean = mean.reshape(-1, *further_axes)
        return rounded(mean, factor, self.dtype, self._fresh.offset)

    def _keep_diagonal(self, target: np.ndarray, rows: np.ndarray) -> None:
        """Let the n-th copies on the writing axis read the n-th copies alone, undivided.

        Both axes take copies in turn, so an entry is kept where the copy numbers of its row and column agree.
        """
        tensor = self.step.tensor
        reading = tensor.reads.index(True)
        read_map = self.maps[reading]
        copies = read_map.counts()
        count = int(copies[0])
        row_numbers = self.row_map.number()
        column_numbers = self.column_map.number()
        by_row = row_numbers[rows, None]
        by_column = column_numbers[None]
        if reading:
            by_row = by_row % count
        else:
            by_column = by_column % count
        diagonal = by_row == by_column
        undivided = scaled(target, float(count), self.dtype)
        target[...] = undivided * diagonal

    @property
    def _holds_tokens(self) -> bool:
        """Check whether rows are tokens, so that mean rows are new tokens."""
        tensor = self.step.tensor
        row_spaces = set(spaces(tensor.axes[0]))
        is_matrix = len(self.step.shape) > 1
        return is_matrix and Space("vocab") in row_spaces

    def _new_tokens(self, rows: np.ndarray) -> np.ndarray:
        """(b, n) the mean row, with a little noise for each new token so that no two are the same."""
        deviation = NEW_TOKENS * self._source.root_mean_square
        columns = self.column_map.source
        numbers = self._fresh.numbers("tokens", columns, rows)
        noise = normal(numbers) * deviation
        mean = self._source.mean
        mean_row = self.format.decoded(mean)
        return self.format.rounded(mean_row + noise)

    @cached_property
    def _noise(self) -> Noise | None:
        """The noise on a matrix that reads copies; None without noise, or where no copies are read."""
        plan = self.plan
        step = self.step
        is_quiet = step.tensor.is_head and not plan.recipe.noisy_head
        is_vector = len(step.shape) < 2
        if is_quiet or is_vector or not plan.noise:
            return None
        noisy_axes = filter(self._reads_copies, (0, 1))
        axis = next(noisy_axes, None)
        if axis is None:
            return None
        axis_map = self.maps[axis]
        deviation = plan.noise * self._source.root_mean_square
        return Noise(axis, axis_map, self.width, deviation, self.dtype, plan.growth.seed, step.name)

    def _reads_copies(self, axis: int) -> bool:
        """Check whether rows (0) or columns (1) are copies that are read.

        None of them may be written: written copies do not sum to the source.
        """
        maps = self.step.maps
        tensor = self.step.tensor
        last = len(maps) - 1
        axes = range(last) if axis == 0 else (last,)
        copied = [dim for dim in axes if maps[dim].repeats]
        if not copied:
            return False
        return all(map(tensor.sums_over, copied))

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
        if finish.noise:
            spread = finish.noise * self._source.root_mean_square
            numbers = self._fresh.numbers("spread", self.width, rows)
            noise = normal(numbers) * spread
            self._add(target, noise)
        if finish.jitter:
            self._jitter(target, rows, finish.jitter)

    def _jitter(self, target: np.ndarray, rows: np.ndarray, size: float) -> None:
        """Add evenly distributed numbers from -`size` to `size` to all copies of a row but the first."""
        copy_numbers = self.row_map.number()
        further = np.flatnonzero(copy_numbers[rows])
        if len(further) == 0:
            return
        part = target[further]
        further_rows = rows[further]
        numbers = self._fresh.numbers("jitter", self.width, further_rows)
        shares = numbers / (1 << 32)
        centred = 2 * shares - 1
        self._add(part, centred * size)
        target[further] = part

    def _redraw(self, target: np.ndarray, rows: np.ndarray, axis: int, indices: np.ndarray) -> None:
        """Draw the rows (0) or columns (1) of these indices anew."""
        mean, deviation = self._redrawn_moments
        if axis == 0:
            is_redrawn = np.isin(rows, indices)
            chosen = np.flatnonzero(is_redrawn)
            redrawn_rows = rows[chosen]
            numbers = self._fresh.numbers("redrawn", self.width, redrawn_rows)
            target[chosen] = self._normal_entries(numbers, mean, deviation)
        else:
            numbers = self._fresh.numbers("redrawn", len(indices), rows)
            target[:, indices] = self._normal_entries(numbers, mean, deviation)

    def _normal_entries(self, numbers: np.ndarray, mean: float, deviation: float) -> np.ndarray:
        """Turn 32-bit numbers into raw entries of a normal distribution."""
        standard = normal(numbers)
        return self.format.rounded(standard * deviation + mean)

    @cached_property
    def _redrawn_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the entries that are drawn anew, as they would have been without."""
        finish = self.step.finish
        assert finish is not None
        assert finish.redrawn is not None
        axis, indices = finish.redrawn
        count, total, square = 0, 0.0, 0.0
        for start, stop in self.blocks():
            rows = np.arange(start, stop)
            block = self._empty(len(rows))
            self._fill_all(block, rows)
            is_replaced = np.isin(rows, indices)
            replaced = block[:, indices] if axis else block[is_replaced]
            raw = np.ascontiguousarray(replaced)
            values = self.format.decoded(raw)
            values = values.astype(np.float64)
            finite = np.isfinite(values)
            if not finite.all():  # where that is allowed
                values = values[finite]
            squares = np.square(values)
            count += values.size
            total += float(values.sum())
            square += float(squares.sum())
        count = max(count, 1)
        mean = total / count
        mean_square = square / count
        variance = max(mean_square - mean**2, 0.0)
        return mean, sqrt(variance)

    def _add(self, target: np.ndarray, values: np.ndarray) -> None:
        """Add numbers to raw entries."""
        before = self.format.decoded(target)
        total = before + values
        target[...] = self.format.rounded(total)


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
