"""Noise that breaks the symmetry of copies: added where they are read.

Where readers were divided it sums to zero over the copies, so that a lossless growth stays lossless.

Shapes:
    b: rows of one block of the target, whose numbers are `rows`
    N: columns of the target
    n: source indices of the axis that noise falls on; c, how often the most copied of them is copied
"""

from __future__ import annotations

import numpy as np

from outgrow.growth.engine.bits import add, floats, lookup, normal_numbers
from outgrow.growth.engine.runs import consecutive
from outgrow.growth.engine.seeding import Draws, normal, quantiles
from outgrow.growth.expansion import AxisMap
from outgrow.model.dtypes import is_short, to_raw, working_type

Where = tuple[slice | np.ndarray, slice | np.ndarray]  # (rows, columns)


class Noise:
    """The noise on one matrix.

    Where the readers were divided, all copies of an index but the last get noise, and the last gets minus
    their sum: they still sum to the source. In 16 bits the last copy `closes` instead: it is set to the
    source minus the stored others, so that their sum rounds once. Where readers were not divided, every
    reader of copies gets noise of its own.

    Args:
        axis: the axis of the stored matrix on which copies are read; `grown` is its map.
        columns: of the target.
        deviation: of the noise on an undivided reader; a divided one gets as much less.
        seed, name: of the randomness.
    """

    def __init__(
        self, axis: int, grown: AxisMap, columns: int, deviation: float, dtype: str, seed: int, name: str
    ) -> None:
        self.axis = axis
        self.grown = grown
        self.dtype = dtype
        # Mark, per index of the axis, the copies that get noise and the last copies, which make up for it.
        counts = grown.counts()[grown.index]
        number = grown.number()
        copied = grown.copies & (counts > 1)
        gains = grown.gain[copied]
        self.divided = bool((gains < 1).all())
        self.closes = self.divided and is_short(dtype)
        is_last = number == counts - 1
        self.last = copied & is_last & self.divided
        self.noisy = copied & ~self.last
        deviations = deviation * grown.gain
        self.deviations = deviations.astype(working_type(dtype))
        # (c, n): the place of that copy on the axis; -1 where there is none or it is the last.
        copies = number[self.noisy]
        most = int(copies.max()) + 1
        index = grown.index[self.noisy]
        shape = (most, grown.source)
        self.places = np.full(shape, -1)
        noisy = np.flatnonzero(self.noisy)
        self.places[copies, index] = noisy
        self.place_of_last = np.full(grown.source, -1)
        index_of_last = grown.index[self.last]
        places_of_last = np.flatnonzero(self.last)
        self.place_of_last[index_of_last] = places_of_last
        # One stream of random numbers per copy of the columns, or one for whole rows.
        kind = np.uint16 if is_short(dtype) else np.uint32
        widths = [columns]
        if axis == 1:
            widths = (self.places >= 0).sum(axis=1).tolist()
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

    def close_columns(self, target: np.ndarray, source: np.ndarray, gain: np.ndarray) -> None:
        """Set the last copies among the columns to the source minus the other copies as stored.

        Args:
            source: (b, n) the raw source rows of the target's.
            gain: (b,) the factor of each row.
        """
        grown = self.grown
        last = np.flatnonzero(self.last)
        index = grown.index[last]
        # Start from the undivided source: the gain of a copy times the number of copies.
        counts = grown.counts()
        copies = counts[grown.index]
        undivided = grown.gain * copies
        row_gain = gain[:, None]
        factors = row_gain * undivided[last]
        factors = factors.astype(working_type(self.dtype))
        copied = source[:, consecutive(index)]
        remainder = self._decoded(copied) * factors
        # Subtract every other copy, as rounded and stored.
        for places in self.places:
            others = places[index]
            present = others >= 0
            other_columns = others[present]
            stored = self._decoded(target[:, other_columns])
            copied_here = consecutive(np.flatnonzero(present))
            with np.errstate(invalid="ignore"):  # infinities, where they are allowed
                remainder[:, copied_here] -= stored
        last_columns = consecutive(last)
        as_before = target[:, last_columns]
        is_finite = np.isfinite(remainder)
        closed = to_raw(remainder, self.dtype)
        target[:, last_columns] = np.where(is_finite, closed, as_before)

    def _decoded(self, raw: np.ndarray) -> np.ndarray:
        """Decode raw bits into numbers of the working type (exact)."""
        contiguous = np.ascontiguousarray(raw)
        return floats(contiguous, self.dtype)

    def _add_to_columns(self, target: np.ndarray, rows: np.ndarray) -> None:
        pairs = zip(self.places, self.draws, strict=True)
        for places, draws in pairs:
            chosen = places[places >= 0]
            numbers = draws.of(rows)
            values = self._values(numbers, self.deviations[chosen])
            columns = consecutive(chosen)
            self._put(target, (slice(None), columns), values)
            if self.divided and not self.closes:
                last = consecutive(self.place_of_last[places >= 0])
                opposite = np.negative(values, out=values)
                self._put(target, (slice(None), last), opposite)

    def _add_to_rows(self, target: np.ndarray, rows: np.ndarray) -> None:
        noisy = np.flatnonzero(self.noisy[rows])
        last = np.flatnonzero(self.last[rows])
        if len(noisy):
            noise = self._of_rows(rows[noisy])
            noisy_rows = consecutive(noisy)
            self._put(target, (noisy_rows, slice(None)), noise)
        if len(last) and not self.closes:
            # The noise of the other copies is drawn again, since their rows may be in another block.
            shape = (len(last), target.shape[1])
            total = np.zeros(shape, working_type(self.dtype))
            index = self.grown.index[rows[last]]
            for others in self.places[:, index]:
                present = others >= 0
                if present.any():
                    drawn = self._of_rows(others[present])
                    total[present] += drawn
            last_rows = consecutive(last)
            self._put(target, (last_rows, slice(None)), -total)

    def _of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Draw the noise on whole rows of the target: (b, N)."""
        deviations = self.deviations[rows][:, None]
        numbers = self.draws[0].of(rows)
        return self._values(numbers, deviations)

    def _values(self, draws: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        """Turn random integers into normal numbers of these deviations, which broadcast with `draws`."""
        if not is_short(self.dtype):
            values = normal(draws) * deviations
            return values.astype(working_type(self.dtype), copy=False)
        first = float(deviations.flat[0])
        if (deviations == first).all():
            return lookup(normal_numbers(first), draws)
        return lookup(quantiles(), draws) * deviations

    def _put(self, target: np.ndarray, where: Where, values: np.ndarray) -> None:
        """Add values to a part of the target, in place where the part is a view."""
        part = target[where]
        is_scattered = any(isinstance(index, np.ndarray) for index in where)
        if is_scattered:
            part = np.ascontiguousarray(part)
        add(part, values, self.dtype)
        if not np.may_share_memory(part, target):
            target[where] = part
