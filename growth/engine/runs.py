"""Indices that lie regularly: runs that rise by one, and runs of one width that come again after a period. Slices copy faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def runs(index: np.ndarray, *same: np.ndarray) -> Iterator[slice]:
    """Slices over which `index` rises by one and every array of `same` stays equal."""
    if len(index) == 0:
        return
    if not same and index[-1] - index[0] == len(index) - 1 and (index[1:] > index[:-1]).all():
        yield slice(0, len(index))
        return
    breaks = index[1:] != index[:-1] + 1
    for array in same:
        breaks |= array[1:] != array[:-1]
    edges = (np.flatnonzero(breaks) + 1).tolist()
    for start, stop in zip([0, *edges], [*edges, len(index)], strict=True):
        yield slice(start, stop)


@dataclass(frozen=True)
class Strips:
    """Columns that lie in `count` strips of one width, `period` from one to the next."""

    first: int
    width: int
    count: int = 1
    period: int = 0

    def of(self, array: np.ndarray) -> np.ndarray:
        """Those columns of (rows, columns), as a view: (rows, width), or (rows, count, width) of several strips."""
        if self.count == 1:
            return array[:, self.first : self.first + self.width]
        row, entry = array.strides
        shape = (len(array), self.count, self.width)
        return np.lib.stride_tricks.as_strided(array[:, self.first :], shape, (row, self.period * entry, entry))


def strips(first: np.ndarray, second: np.ndarray) -> tuple[Strips, Strips] | None:
    """Two equally long arrays of indices as strips that are counted alike; None where they lie otherwise."""
    starts, stops = np.transpose([(run.start, run.stop) for run in runs(first, second - first)])
    width = int(stops[0])
    periods = [np.diff(indices[starts]) for indices in (first, second)]
    if (stops - starts != width).any() or any((each != each[:1]).any() for each in periods):
        return None
    of_first, of_second = (int(each[0]) if len(each) else 0 for each in periods)
    return Strips(int(first[0]), width, len(starts), of_first), Strips(int(second[0]), width, len(starts), of_second)


def consecutive(indices: np.ndarray) -> slice | np.ndarray:
    """A slice where the indices rise by one, which copies faster, else the indices."""
    return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) and (indices[1:] == indices[:-1] + 1).all() else indices
