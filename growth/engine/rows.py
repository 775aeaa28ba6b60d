"""Rows of a source tensor: read, decoded to the target's format, and their mean.

Shapes: see `growth.engine.execute`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Protocol

import numpy as np

from outgrow.growth.decision import Step
from outgrow.growth.engine.bits import accumulate, finite_mean, floats
from outgrow.growth.engine.runs import runs
from outgrow.growth.plan import Plan
from outgrow.model.dtypes import to_raw, working_type

STRETCH = 32  # source rows that are summed in the working type before their sum is added up in float64
MANY_ROWS = 1024  # above this the root mean square is that of every eighth stretch


class Reader(Protocol):
    """A place that source tensors come from: a checkpoint on disk, or tensors in memory."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows `start:stop` of a tensor as raw bits, into an array that the caller may write to.

        Returns:
            (r, n), where all axes but the last count rows together; of a vector, its entries.
        """


@dataclass(frozen=True)
class Format:
    """A stored format, and the working type in which its numbers are computed."""

    dtype: str

    @cached_property
    def working(self) -> type[np.floating]:
        """The floating-point type in which numbers are computed."""
        return working_type(self.dtype)

    def decoded(self, raw: np.ndarray) -> np.ndarray:
        """Decode raw bits into numbers of the working type (exact)."""
        return floats(raw, self.dtype)

    def encoded(self, values: np.ndarray) -> np.ndarray:
        """Round numbers to the stored format, as raw bits."""
        return to_raw(values, self.dtype)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """Round float64 numbers to the working type and from there to the stored format, as raw bits."""
        working = values.astype(self.working)
        return self.encoded(working)


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
        start = 0
        while start < len(raw):
            missing = STRETCH - self.rows % STRETCH
            part = raw[start : start + missing]
            accumulate(part, self._stretch, self.dtype)
            start += len(part)
            self.rows += len(part)
            if self.rows % STRETCH == 0:
                self._stretches += self._stretch
                self._stretch[:] = 0

    @property
    def total(self) -> np.ndarray:
        """(n,) the sum, float64."""
        return self._stretches + self._stretch


@dataclass(frozen=True, eq=False)
class SourceRows:
    """The rows of the source tensors of one step, in the target's format.

    A vector is one row; of more than two axes all but the last count rows together.

    Attributes:
        count: m, the number of rows.
        columns: n.
    """

    plan: Plan
    step: Step
    reader: Reader
    format: Format
    count: int
    columns: int

    def gather(self, name: str | None, index: np.ndarray) -> np.ndarray:
        """Raw rows of the source tensor `name`, averaged with those beside it: (len(index), n)."""
        assert name is not None
        rows = self._read(name, index)
        beside = self.step.beside
        if beside is None or name != self.step.source:
            return rows
        rows_beside = self._read(beside, index)
        own = self._half(rows)
        other = self._half(rows_beside)
        return self.format.encoded(own + other)

    def _half(self, raw: np.ndarray) -> np.ndarray:
        contiguous = np.ascontiguousarray(raw)
        return 0.5 * self.format.decoded(contiguous)

    def _read(self, name: str, index: np.ndarray) -> np.ndarray:
        """Read raw rows of the source tensor `name`, one read per run of rows: (len(index), n)."""
        is_vector = len(self.step.shape) < 2
        if is_vector:
            vector = self.reader.read(name)
            one_row = vector.reshape(1, -1)
            return self._in_format(name, one_row)
        parts = []
        for run in runs(index):
            first = int(index[run.start])
            count = run.stop - run.start
            part = self.reader.read(name, first, first + count)
            parts.append(part)
        only_run = len(parts) == 1
        rows = parts[0] if only_run else np.concatenate(parts)
        return self._in_format(name, rows)

    def _in_format(self, name: str, raw: np.ndarray) -> np.ndarray:
        """Convert raw bits of a source tensor to the target's format, which is the same or a wider one."""
        stored = self.plan.source_dtype(name)
        if stored == self.format.dtype:
            return raw
        values = floats(raw, stored)
        return self.format.encoded(values)

    def _stretches(self, first: int, step: int) -> Iterator[np.ndarray]:
        """Gather up to `STRETCH` raw rows from the row `first` on, and from every `step`-th after it."""
        for start in range(first, self.count, step):
            stop = min(start + STRETCH, self.count)
            index = np.arange(start, stop)
            yield self.gather(self.step.source, index)

    @cached_property
    def root_mean_square(self) -> float:
        """Root mean square of the source; of more than 1,024 rows, of every eighth stretch."""
        square, count = 0.0, 0
        # A stretch that stands for eight lies in the middle of them.
        first, step = 0, STRETCH
        if self.count > MANY_ROWS:
            step = 8 * STRETCH
            first = 7 * STRETCH // 2
        for stretch in self._stretches(first, step):
            values = self.format.decoded(stretch)
            infinite = ~np.isfinite(values)  # where they are allowed, they say nothing of the others
            values[infinite] = 0
            count += values.size - int(infinite.sum())
            squares = np.square(values, out=values)
            by_row = squares.sum(axis=1)
            square += float(by_row.sum(dtype=np.float64))
        mean_square = square / max(count, 1)
        return sqrt(mean_square)

    @cached_property
    def sums(self) -> RowSum:
        """The sum of the first rows, to which those copied are added as they pass."""
        return RowSum(self.columns, self.format.dtype)

    @cached_property
    def mean(self) -> np.ndarray:
        """(1, n) the mean of all source rows, raw, rounded to the stored format.

        Of a column with entries that are not finite, where that is allowed, it is the mean of the others.
        """
        # those that no copied row has added yet
        for stretch in self._stretches(self.sums.rows, STRETCH):
            self.sums.add(stretch)
        mean = self.sums.total / self.count
        is_finite = np.isfinite(mean)
        strange = np.flatnonzero(~is_finite)
        if len(strange):
            index = np.arange(self.count)
            every_row = self.gather(self.step.source, index)
            values = self.format.decoded(every_row)
            strange_columns = values[:, strange]
            mean[strange] = finite_mean(strange_columns, axis=0)
        one_row = mean[None]
        return self.format.encoded(one_row)
