"""Regular patterns of indices, which slices copy faster: runs that rise by one, and runs repeated at a
period.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def runs(index: np.ndarray, *same: np.ndarray) -> Iterator[slice]:
    """Yield slices over which `index` rises by one and every array of `same` stays equal."""
    if len(index) == 0:
        return
    if not same and _is_one_run(index):
        yield slice(0, len(index))
        return
    next_in_run = index[:-1] + 1
    breaks = index[1:] != next_in_run
    for array in same:
        before = array[:-1]
        after = array[1:]
        breaks |= before != after
    edges = (np.flatnonzero(breaks) + 1).tolist()
    starts = [0, *edges]
    stops = [*edges, len(index)]
    for start, stop in zip(starts, stops, strict=True):
        yield slice(start, stop)


def _is_one_run(index: np.ndarray) -> bool:
    """Check whether indices rise by one throughout."""
    steps = index[-1] - index[0]
    length = steps + 1
    if length != len(index):
        return False
    before = index[:-1]
    after = index[1:]
    rises = after > before
    return bool(rises.all())


@dataclass(frozen=True)
class Strips:
    """Columns in `count` strips of one width, the next one `period` columns further."""

    first: int
    width: int
    count: int = 1
    period: int = 0

    def of(self, array: np.ndarray) -> np.ndarray:
        """View these columns of an array: (rows, columns) → (rows, width), or (rows, count, width) of
        several.
        """
        if self.count == 1:
            stop = self.first + self.width
            return array[:, self.first : stop]
        row, entry = array.strides
        shape = (len(array), self.count, self.width)
        strides = (row, self.period * entry, entry)
        from_first = array[:, self.first :]
        return np.lib.stride_tricks.as_strided(from_first, shape, strides)


def strips(first: np.ndarray, second: np.ndarray) -> tuple[Strips, Strips] | None:
    """Write two equally long arrays of indices as strips of the same count and width.

    Returns:
        None where the indices do not follow this pattern.
    """
    together = runs(first, second - first)
    ends = [(run.start, run.stop) for run in together]
    starts, stops = np.transpose(ends)
    width = int(stops[0])
    count = len(starts)
    steps = [np.diff(indices[starts]) for indices in (first, second)]
    irregular = any((step != step[:1]).any() for step in steps)
    lengths = stops - starts
    if irregular or (lengths != width).any():
        return None
    periods = (0, 0)
    if count > 1:
        periods = (int(steps[0][0]), int(steps[1][0]))
    one = Strips(int(first[0]), width, count, periods[0])
    other = Strips(int(second[0]), width, count, periods[1])
    return one, other


def consecutive(indices: np.ndarray) -> slice | np.ndarray:
    """Turn indices that rise by one into a slice, which copies faster; others stay as they are."""
    next_index = indices[:-1] + 1
    gaps = indices[1:] != next_index
    if len(indices) == 0 or gaps.any():
        return indices
    first = int(indices[0])
    last = int(indices[-1])
    return slice(first, last + 1)
