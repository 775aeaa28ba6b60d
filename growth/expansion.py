"""Expansions: the growth of one axis. An axis map gives every target index a source index and a gain, or a
fresh fill.

An `Expansion` belongs to a space and holds a map for each side: `write` for tensors that write the space,
`read` for tensors that read it. Growth is lossless on a space when reading after writing is the identity on
what the network can observe; `growth.certificate` proves it.

Shapes:
    n, N: indices of the axis in the source and in the target
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property, reduce
from itertools import chain

import numpy as np

from outgrow.growth.engine.runs import Strips, runs, strips
from outgrow.model.notation import Axis, Product, Space


class Fill(IntEnum):
    """The content of a target index."""

    COPY = 0  # gain × the source index
    ZERO = 1
    MEAN = 2  # gain × the mean of the source tensor over this axis
    RANDOM = 3  # fresh values: normal(0, σ) in matrices, 0 in biases, 1 in norm scales
    NEXT = 4  # gain × the source index in the same tensor of the next source layer


_Alike = tuple[Fill, float]  # (fill, gain)
_Content = tuple[Fill, float, int, int]  # (fill, gain, first source column, number of columns)


@dataclass(frozen=True, eq=False)
class Piece:
    """A group of target columns that share fill and gain.

    Attributes:
        target: the target indices, as strips where they are regular, else one by one.
        source: the source indices they take; of fresh ones, their places among the fresh ones.
        gain: the factor on them.
        like: an earlier group with the same content, which is copied instead of computed.
    """

    fill: Fill
    target: Strips | np.ndarray
    source: Strips | np.ndarray
    gain: float
    like: Strips | None = None

    def taken_from(self, array: np.ndarray) -> np.ndarray:
        """Take its columns of the source or of the fresh ones: (rows, n) → (rows, columns)."""
        if isinstance(self.source, Strips):
            return self.source.of(array)
        return array.take(self.source, axis=1)


@dataclass(frozen=True, eq=False)
class AxisMap:
    """The growth of one axis of one tensor: n source → N target indices.

    Attributes:
        source: n.
        index: (N,) the source index each target index takes (also in the next layer); 0 where none is taken.
        gain: (N,) the factor on it.
        fill: (N,) a `Fill`.
    """

    source: int
    index: np.ndarray
    gain: np.ndarray
    fill: np.ndarray

    @classmethod
    def of(
        cls, source: int, index: np.ndarray, fill: Fill = Fill.RANDOM, gain: np.ndarray | float = 1.0
    ) -> AxisMap:
        """Make a map from an index with -1 where the target index is new and holds `fill`."""
        index = np.asarray(index, np.int64)
        new = index < 0
        values = np.asarray(gain, np.float64)
        gains = np.broadcast_to(values, index.shape)
        fills = np.where(new, fill, Fill.COPY)
        copied = np.where(new, 0, index)
        fills = fills.astype(np.uint8)
        return cls(source, copied, gains.copy(), fills)

    @classmethod
    def identity(cls, size: int) -> AxisMap:
        """Make the map under which nothing changes."""
        return cls.of(size, np.arange(size))

    @property
    def target(self) -> int:
        return len(self.index)

    @property
    def copies(self) -> np.ndarray:
        """(N,) mask of the target indices that take a source index."""
        return self.fill == Fill.COPY

    @property
    def is_identity(self) -> bool:
        same_size = self.source == self.target
        is_one = self.gain == 1
        unscaled = bool(self.copies.all() and is_one.all())
        in_order = range(self.source)
        return same_size and unscaled and self.same_index(in_order)

    def same_index(self, index: np.ndarray | range) -> bool:
        """Check that the copied indices are exactly `index`."""
        return np.array_equal(self.index, np.asarray(index))

    def counts(self) -> np.ndarray:
        """(n,) the number of copies of each source index."""
        index = self.index[self.copies]
        return np.bincount(index, minlength=self.source)

    @property
    def repeats(self) -> bool:
        """Check whether a source index has several copies."""
        most = self.counts().max()
        return bool(most > 1)

    def scaled(self, factor: float) -> AxisMap:
        """Multiply every gain."""
        return replace(self, gain=self.gain * factor)

    def cut(self, start: int, stop: int) -> AxisMap:
        """The map of the target indices `start` to `stop` alone."""
        part = slice(start, stop)
        index = self.index[part]
        gain = self.gain[part]
        fill = self.fill[part]
        return AxisMap(self.source, index, gain, fill)

    def split(self) -> AxisMap:
        """Make the reading side of these copies: each divided by their number, so that they sum to the
        source.
        """
        counts = self.counts()[self.index]
        divisors = np.maximum(counts, 1)
        return replace(self, gain=self.gain / divisors)

    def number(self) -> np.ndarray:
        """(N,) the number of each copy among those of its source index: 0, 1, …; 0 where it is no copy."""
        number = np.zeros(self.target, np.int64)
        copied = np.flatnonzero(self.copies)
        copied_from = self.index[copied]
        by_source = np.argsort(copied_from, kind="stable")
        order = copied[by_source]
        if len(order):
            # Sorted by source index, each run of equal indices counts from 0.
            steps = np.diff(self.index[order])
            changes = np.flatnonzero(steps) + 1
            starts = np.r_[0, changes]
            stops = np.r_[changes, len(order)]
            first = np.repeat(starts, stops - starts)
            positions = np.arange(len(order))
            number[order] = positions - first
        return number

    def from_next_layer(self, new: np.ndarray) -> AxisMap:
        """Take the indices marked in `new` from the next layer instead."""
        fill = np.where(new, Fill.NEXT, self.fill)
        return replace(self, fill=fill.astype(np.uint8))

    def filled(self, fill: Fill) -> AxisMap:
        """Let every new index hold `fill`."""
        fills = np.where(self.copies, Fill.COPY, fill)
        return replace(self, fill=fills.astype(np.uint8))

    @cached_property
    def pieces(self) -> list[Piece]:
        """Pieces that cover the axis: one per run of columns, or one for all of a fill and gain where runs
        are many.
        """
        is_copy = self.fill == Fill.COPY
        has_source = is_copy | (self.fill == Fill.NEXT)
        fresh = self.fill == Fill.RANDOM
        positions = np.arange(self.target)
        source = np.where(has_source, self.index, positions)
        source[fresh] = np.arange(fresh.sum())
        pieces: dict[_Alike, list[Piece]] = {}
        first: dict[_Content, Strips] = {}  # the first target columns with this content
        for run in runs(source, self.gain, self.fill):
            number = int(self.fill[run.start])
            fill = Fill(number)
            gain = float(self.gain[run.start])
            width = run.stop - run.start
            target = Strips(run.start, width)
            column = int(source[run.start])
            columns = Strips(column, width)
            like = target
            if has_source[run.start]:
                content = (fill, gain, columns.first, width)
                like = first.setdefault(content, target)
            is_first = like is target
            earlier = None if is_first else like
            piece = Piece(fill, target, columns, gain, earlier)
            alike = (fill, gain)
            pieces.setdefault(alike, []).append(piece)
        merged = [self._together(alike, source) for alike in pieces.values()]
        return list(chain.from_iterable(merged))

    def _together(self, pieces: list[Piece], source: np.ndarray) -> list[Piece]:
        """Merge many pieces of the same fill and gain."""
        if len(pieces) <= 4:
            return pieces
        fill = pieces[0].fill
        gain = pieces[0].gain
        same_gain = self.gain == gain
        same_fill = self.fill == fill
        chosen = np.flatnonzero(same_gain & same_fill)
        if regular := strips(chosen, source[chosen]):
            return [Piece(fill, *regular, gain)]
        if len(pieces) <= self.target // 16:
            return pieces
        return [Piece(fill, chosen, source[chosen], gain)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AxisMap):
            return NotImplemented
        same_fill = np.array_equal(self.fill, other.fill)
        if self.source != other.source or not same_fill:
            return False
        copies = self.copies
        other_index = other.index[copies]
        same_index = np.array_equal(self.index[copies], other_index)
        scaled = copies | (self.fill == Fill.MEAN)
        gains = self.gain[scaled]
        other_gains = other.gain[scaled]
        return same_index and np.allclose(gains, other_gains, rtol=1e-12, atol=0)

    __hash__ = None  # type: ignore[assignment]


# A new index on one axis of a product decides for the whole product; where two are new, the stronger
# statement wins.
_PRECEDENCE = np.array([0, 4, 2, 3, 1])  # COPY < NEXT < MEAN < RANDOM < ZERO, indexed by Fill
_TAKES = np.array([True, False, False, False, True])  # fills that take a source index


def product(left: AxisMap, right: AxisMap) -> AxisMap:
    """Compose the map of the flattened axis `(left right)`, row-major."""
    # (left, right), flattened at the end
    left_index = left.index[:, None]
    first = left_index * right.source
    index = (first + right.index).reshape(-1)
    left_gain = left.gain[:, None]
    gain = (left_gain * right.gain).reshape(-1)
    left_fill = left.fill[:, None]
    one, other = np.broadcast_arrays(left_fill, right.fill)
    left_holds = _PRECEDENCE[one] >= _PRECEDENCE[other]
    pairs = np.where(left_holds, one, other)
    fill = pairs.reshape(-1)
    index = np.where(_TAKES[fill], index, 0)
    source = left.source * right.source
    return AxisMap(source, index, gain, fill)


def concatenate(left: AxisMap, right: AxisMap) -> AxisMap:
    """Compose the map of the axis `[left | right]`."""
    return AxisMap(
        left.source + right.source,
        np.concatenate([left.index, np.where(_TAKES[right.fill], right.index + left.source, 0)]),
        np.concatenate([left.gain, right.gain]),
        np.concatenate([left.fill, right.fill]),
    )


def compose(axis: Axis, of_space: Callable[[Space], AxisMap]) -> AxisMap:
    """Compose the map of an axis from the maps of its spaces; a number stays as it is."""
    if isinstance(axis, Space):
        if axis.fixed:
            fixed_size = int(axis.name)
            return AxisMap.identity(fixed_size)
        return of_space(axis)
    parts = (compose(part, of_space) for part in axis.parts)
    join = product if isinstance(axis, Product) else concatenate
    return reduce(join, parts)


@dataclass(frozen=True, eq=False)
class Expansion:
    """The growth of one space, for each kind of tensor that touches it.

    Attributes:
        write, read: for tensors that write and read the space.
        head: for the output head, which reads what the final norm leaves.
        scale, shift: for the γ and β of a norm over it (the residual stream, or a head).
        final_scale, final_shift: for the norm before the output head.
        post_scale: for a norm whose output is added to the residual stream.
        rule: in words, for the printed plan.
    """

    write: AxisMap
    read: AxisMap
    head: AxisMap
    rule: str
    scale: AxisMap
    shift: AxisMap
    final_scale: AxisMap
    final_shift: AxisMap
    post_scale: AxisMap

    @classmethod
    def of(
        cls,
        write: AxisMap,
        read: AxisMap,
        rule: str,
        *,
        scale: AxisMap | None = None,
        shift: AxisMap | None = None,
    ) -> Expansion:
        """Make an expansion whose norm maps are, by default, the writing map."""
        scale = scale or write
        shift = shift or write
        return cls(write, read, read, rule, scale, shift, scale, shift, scale)

    @classmethod
    def identity(cls, size: int) -> Expansion:
        """Make the expansion of a space that does not grow."""
        unchanged = AxisMap.identity(size)
        return cls.of(unchanged, unchanged, "unchanged")
