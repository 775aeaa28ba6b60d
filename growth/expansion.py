"""Expansions: how one axis grows. An axis map says, for every target index, which source index it takes, times what, or how it is new.

An `Expansion` belongs to a space and holds a map for each side: `write` for tensors that write the space, `read` for tensors that read it.
Growth is lossless on a space when reading after writing is the identity on what the network can observe; `growth.certificate` proves it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property, reduce

import numpy as np

from outgrow.growth.engine.runs import Strips, runs, strips
from outgrow.model.notation import Axis, Product, Space


class Fill(IntEnum):
    """What a target index holds."""

    COPY = 0  # gain × the source index
    ZERO = 1
    MEAN = 2  # gain × the mean of the source tensor over this axis
    RANDOM = 3  # fresh values: normal(0, σ) in matrices, 0 in biases, 1 in norm scales
    NEXT = 4  # gain × the source index in the same tensor of the next source layer


@dataclass(frozen=True, eq=False)
class Piece:
    """Indices of an axis, seen as columns, that are filled alike.

    Attributes:
        target: which target indices, as strips where they lie so, else one by one.
        source: which source indices they take; of fresh ones, how many fresh ones come before.
        gain: the factor on them.
        like: target indices that come before and hold the same.
    """

    fill: Fill
    target: Strips | np.ndarray
    source: Strips | np.ndarray
    gain: float
    like: Strips | None = None

    def taken_from(self, array: np.ndarray) -> np.ndarray:
        """The columns it takes, of source or fresh ones."""
        return self.source.of(array) if isinstance(self.source, Strips) else array.take(self.source, axis=1)


@dataclass(frozen=True, eq=False)
class AxisMap:
    """One axis of one tensor: n source → N target indices.

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
    def of(cls, source: int, index: np.ndarray, fill: Fill = Fill.RANDOM, gain: np.ndarray | float = 1.0) -> AxisMap:
        """From an index with -1 where the target index is new and holds `fill`."""
        index = np.asarray(index, np.int64)
        new = index < 0
        gains = np.broadcast_to(np.asarray(gain, np.float64), index.shape).copy()
        return cls(source, np.where(new, 0, index), gains, np.where(new, fill, Fill.COPY).astype(np.uint8))

    @classmethod
    def identity(cls, size: int) -> AxisMap:
        """Nothing changes."""
        return cls.of(size, np.arange(size))

    @property
    def target(self) -> int:
        return len(self.index)

    @property
    def copies(self) -> np.ndarray:
        """(N,) whether each target index takes a source index."""
        return self.fill == Fill.COPY

    @property
    def is_identity(self) -> bool:
        return self.source == self.target and bool(self.copies.all() and (self.gain == 1).all()) and self.same_index(range(self.source))

    def same_index(self, index: np.ndarray | range) -> bool:
        """Whether the copied indices are exactly `index`."""
        return np.array_equal(self.index, np.asarray(index))

    def counts(self) -> np.ndarray:
        """(n,) how often each source index is copied."""
        return np.bincount(self.index[self.copies], minlength=self.source)

    def scaled(self, factor: float) -> AxisMap:
        """The same map with every gain multiplied."""
        return replace(self, gain=self.gain * factor)

    def cut(self, start: int, stop: int) -> AxisMap:
        """The map of the target indices `start` to `stop` alone."""
        return AxisMap(self.source, self.index[start:stop], self.gain[start:stop], self.fill[start:stop])

    def split(self) -> AxisMap:
        """The reading side of these copies: each divided by how many copies there are, so that they sum to the source."""
        return replace(self, gain=self.gain / np.maximum(self.counts()[self.index], 1))

    def number(self) -> np.ndarray:
        """(N,) which copy of its source index each target index is: 0 for the first, 1 for the second, …; 0 where it is none."""
        number = np.zeros(self.target, np.int64)
        copied = np.flatnonzero(self.copies)
        order = copied[np.argsort(self.index[copied], kind="stable")]
        if len(order):
            starts = np.r_[0, np.flatnonzero(np.diff(self.index[order])) + 1]
            number[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
        return number

    def from_next_layer(self, new: np.ndarray) -> AxisMap:
        """The same map with the indices marked in `new` taken from the next layer instead."""
        return replace(self, fill=np.where(new, Fill.NEXT, self.fill).astype(np.uint8))

    def filled(self, fill: Fill) -> AxisMap:
        """The same map with every new index holding `fill`."""
        return replace(self, fill=np.where(self.copies, Fill.COPY, fill).astype(np.uint8))

    @cached_property
    def pieces(self) -> list[Piece]:
        """The indices, a piece per stretch, or where those are many, a piece for all that are filled with the same gain."""
        taken = (self.fill == Fill.COPY) | (self.fill == Fill.NEXT)
        fresh_before = np.cumsum(self.fill == Fill.RANDOM) - 1
        source = np.where(taken, self.index, np.where(self.fill == Fill.RANDOM, fresh_before, np.arange(self.target)))
        pieces: dict[tuple[Fill, float], list[Piece]] = {}
        first: dict[tuple[Fill, float, int, int], Strips] = {}
        for run in runs(source, self.gain, self.fill):
            alike = (Fill(int(self.fill[run.start])), float(self.gain[run.start]))
            target, taken_from = Strips(run.start, run.stop - run.start), Strips(int(source[run.start]), run.stop - run.start)
            like = first.setdefault((*alike, taken_from.first, taken_from.width), target) if taken[run.start] else target
            pieces.setdefault(alike, []).append(Piece(alike[0], target, taken_from, alike[1], like if like is not target else None))
        return [piece for alike in pieces.values() for piece in self._together(alike, source)]

    def _together(self, pieces: list[Piece], source: np.ndarray) -> list[Piece]:
        """Fewer pieces for many that are filled with the same gain."""
        if len(pieces) <= 4:
            return pieces
        fill, gain = pieces[0].fill, pieces[0].gain
        chosen = np.flatnonzero((self.fill == fill) & (self.gain == gain))
        if found := strips(chosen, source[chosen]):
            return [Piece(fill, *found, gain)]
        return pieces if len(pieces) <= self.target // 16 else [Piece(fill, chosen, source[chosen], gain)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AxisMap):
            return NotImplemented
        mine, theirs = self.copies | (self.fill == Fill.MEAN), other.copies | (other.fill == Fill.MEAN)
        return (
            self.source == other.source
            and np.array_equal(self.fill, other.fill)
            and np.array_equal(self.index[self.copies], other.index[other.copies])
            and np.allclose(self.gain[mine], other.gain[theirs], rtol=1e-12, atol=0)
        )

    __hash__ = None  # type: ignore[assignment]


# A new index on one axis of a product decides for the whole product; where two are new, the stronger statement wins.
_PRECEDENCE = np.array([0, 4, 2, 3, 1])  # COPY < NEXT < MEAN < RANDOM < ZERO, indexed by Fill
_TAKES = np.array([True, False, False, False, True])  # fills that take a source index


def product(left: AxisMap, right: AxisMap) -> AxisMap:
    """The map of the flattened axis `(left right)`, row-major."""
    index = (left.index[:, None] * right.source + right.index[None]).reshape(-1)
    gain = (left.gain[:, None] * right.gain[None]).reshape(-1)
    mine, theirs = np.broadcast_arrays(left.fill[:, None], right.fill[None])
    fill = np.where(_PRECEDENCE[mine] >= _PRECEDENCE[theirs], mine, theirs).reshape(-1)
    return AxisMap(left.source * right.source, np.where(_TAKES[fill], index, 0), gain, fill)


def concatenate(left: AxisMap, right: AxisMap) -> AxisMap:
    """The map of the axis `[left | right]`."""
    return AxisMap(
        left.source + right.source,
        np.concatenate([left.index, np.where(_TAKES[right.fill], right.index + left.source, 0)]),
        np.concatenate([left.gain, right.gain]),
        np.concatenate([left.fill, right.fill]),
    )


def compose(axis: Axis, of_space: Callable[[Space], AxisMap]) -> AxisMap:
    """The map of a whole axis from the maps of its spaces; a number stays as it is."""
    if isinstance(axis, Space):
        return AxisMap.identity(int(axis.name)) if axis.fixed else of_space(axis)
    parts = (compose(part, of_space) for part in axis.parts)
    return reduce(product if isinstance(axis, Product) else concatenate, parts)


@dataclass(frozen=True, eq=False)
class Expansion:
    """How one space grows, for each kind of tensor that touches it.

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
    def of(cls, write: AxisMap, read: AxisMap, rule: str, *, scale: AxisMap | None = None, shift: AxisMap | None = None) -> Expansion:
        """An expansion whose norm maps are, unless given, the writing map."""
        scale, shift = scale or write, shift or write
        return cls(write, read, read, rule, scale, shift, scale, shift, scale)

    @classmethod
    def identity(cls, size: int) -> Expansion:
        """The space does not grow."""
        unchanged = AxisMap.identity(size)
        return cls.of(unchanged, unchanged, "unchanged")
