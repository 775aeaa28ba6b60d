"""Noise that breaks the symmetry of copies: added where they are read.

Where readers were divided it sums to zero over the copies, so that a lossless growth stays lossless.
"""

from __future__ import annotations

import numpy as np

from outgrow.growth.engine.bits import add, lookup, normal_numbers
from outgrow.growth.engine.runs import consecutive
from outgrow.growth.engine.seeding import Draws, normal, quantiles
from outgrow.growth.expansion import AxisMap
from outgrow.model.dtypes import is_short, working_type

Where = tuple[slice | np.ndarray, slice | np.ndarray]  # (rows, columns)


class Noise:
    """The noise on one matrix.

    Where the readers were divided, all copies of an index but the last get noise, and the last gets minus
    their sum: they still sum to the source. In 16 bits the last copy `closes` instead: the caller sets it to
    the source minus the stored others. Where readers were not divided, every reader of copies gets noise of
    its own.

    Args:
        axis: the axis of the stored matrix on which copies are read; `grown` is its map.
        columns: of the target.
        deviation: of the noise on an undivided reader; a divided one gets as much less.
        seed, name: of the randomness.
    """

    def __init__(
        self, axis: int, grown: AxisMap, columns: int, deviation: float, dtype: str, seed: int, name: str
    ) -> None:
        self.axis, self.grown, self.dtype = axis, grown, dtype
        # Mark, per index of the axis, the copies that get noise and the last copies, which make up for it.
        counts = grown.counts()[grown.index]
        number = grown.number()
        copied = grown.copies & (counts > 1)
        self.divided = bool((grown.gain[copied] < 1).all())
        self.closes = self.divided and is_short(dtype)
        self.last = copied & (number == counts - 1) & self.divided
        self.noisy = copied & ~self.last
        self.deviations = (deviation * grown.gain).astype(working_type(dtype))
        # (copy, source index): the place of that copy on the axis; -1 where there is none or it is the last.
        copies = number[self.noisy]
        self.places = np.full((int(copies.max()) + 1, grown.source), -1)
        self.places[copies, grown.index[self.noisy]] = np.flatnonzero(self.noisy)
        self.place_of_last = np.full(grown.source, -1)
        self.place_of_last[grown.index[self.last]] = np.flatnonzero(self.last)
        # One stream of random numbers per copy of the columns, or one for whole rows.
        kind = np.uint16 if is_short(dtype) else np.uint32
        widths = [columns] if axis == 0 else (self.places >= 0).sum(axis=1).tolist()
        self.draws = [
            Draws(width, kind, seed, name, "noise", copy)  # by copy
            for copy, width in enumerate(widths)
        ]

    def add(self, target: np.ndarray, rows: np.ndarray) -> None:
        """Add the noise to raw target rows of these numbers: (b, N)."""
        if self.axis == 1:
            self._add_to_columns(target, rows)
        else:
            self._add_to_rows(target, rows)

    def _add_to_columns(self, target: np.ndarray, rows: np.ndarray) -> None:
        for places, draws in zip(self.places, self.draws, strict=True):
            chosen = places[places >= 0]
            values = self._values(draws.of(rows), self.deviations[chosen])
            self._put(target, (slice(None), consecutive(chosen)), values)
            if self.divided and not self.closes:
                last = consecutive(self.place_of_last[places >= 0])
                self._put(target, (slice(None), last), np.negative(values, out=values))

    def _add_to_rows(self, target: np.ndarray, rows: np.ndarray) -> None:
        noisy = np.flatnonzero(self.noisy[rows])
        last = np.flatnonzero(self.last[rows])
        if len(noisy):
            self._put(target, (consecutive(noisy), slice(None)), self._of_rows(rows[noisy]))
        if len(last) and not self.closes:
            # The noise of the other copies is drawn again, since their rows may be in another block.
            total = np.zeros((len(last), target.shape[1]), working_type(self.dtype))
            index = self.grown.index[rows[last]]
            for others in self.places[:, index]:
                there = others >= 0
                if there.any():
                    total[there] += self._of_rows(others[there])
            self._put(target, (consecutive(last), slice(None)), -total)

    def _of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Draw the noise on whole rows of the target: (b, N)."""
        deviations = self.deviations[rows][:, None]
        return self._values(self.draws[0].of(rows), deviations)

    def _values(self, draws: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        """Turn random integers into normal numbers of these deviations, which broadcast with `draws`."""
        if not is_short(self.dtype):
            return (normal(draws) * deviations).astype(working_type(self.dtype), copy=False)
        first = float(deviations.flat[0])
        if (deviations == first).all():
            return lookup(normal_numbers(first), draws)
        return lookup(quantiles(), draws) * deviations

    def _put(self, target: np.ndarray, where: Where, values: np.ndarray) -> None:
        """Add values to a part of the target, in place where the part is a view."""
        part = target[where]
        if any(isinstance(index, np.ndarray) for index in where):
            part = np.ascontiguousarray(part)
        add(part, values, self.dtype)
        if not np.may_share_memory(part, target):
            target[where] = part
