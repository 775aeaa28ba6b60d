"""Noise that breaks the symmetry of copies: added where they are read, and where readers were divided, summing to zero over them."""

from __future__ import annotations

import numpy as np

from outgrow.growth.engine.bits import add, lookup, normal_numbers
from outgrow.growth.engine.runs import consecutive
from outgrow.growth.engine.seeding import Draws, normal, quantiles
from outgrow.growth.expansion import AxisMap
from outgrow.model.dtypes import is_short, working_type


class Noise:
    """The noise on one matrix.

    Where the readers were divided, all copies of an index but the last get noise and the last gets minus its sum: they still sum to the
    source. In 16 bits the last one `closes` instead: whoever adds the noise sets it to what the stored others leave of the source. Where
    readers were not divided, every reader of copies gets noise of its own.

    Args:
        axis: of the stored matrix, the one on which copies are read; `grown` is its map.
        columns: of the target.
        deviation: of the noise on an undivided reader; a divided one gets as much less.
        seed, name: of the randomness.
    """

    def __init__(self, axis: int, grown: AxisMap, columns: int, deviation: float, dtype: str, seed: int, name: str) -> None:
        self.axis, self.grown, self.dtype = axis, grown, dtype
        counts, number = grown.counts()[grown.index], grown.number()
        copied = grown.copies & (counts > 1)
        self.divided = bool((grown.gain[copied] < 1).all())
        self.closes = self.divided and is_short(dtype)
        self.last = copied & (number == counts - 1) & self.divided
        self.noisy = copied & ~self.last
        self.deviations = (deviation * grown.gain).astype(working_type(dtype))
        # (copy, source index): where on the axis that copy is, or -1 where there is none or it is the last
        self.places = np.full((int(number[self.noisy].max()) + 1, grown.source), -1)
        self.places[number[self.noisy], grown.index[self.noisy]] = np.flatnonzero(self.noisy)
        self.place_of_last = np.full(grown.source, -1)
        self.place_of_last[grown.index[self.last]] = np.flatnonzero(self.last)
        kind = np.uint16 if is_short(dtype) else np.uint32
        widths = [columns] if axis == 0 else (self.places >= 0).sum(axis=1).tolist()
        self.draws = [Draws(width, kind, seed, name, "noise", copy) for copy, width in enumerate(widths)]

    def add(self, target: np.ndarray, rows: np.ndarray) -> None:
        """Add it to raw rows of these numbers of the target."""
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
                self._put(target, (slice(None), consecutive(self.place_of_last[places >= 0])), np.negative(values, out=values))

    def _add_to_rows(self, target: np.ndarray, rows: np.ndarray) -> None:
        if len(noisy := np.flatnonzero(self.noisy[rows])):
            self._put(target, (consecutive(noisy), slice(None)), self._of_rows(rows[noisy]))
        if len(last := np.flatnonzero(self.last[rows])) and not self.closes:
            total = np.zeros((len(last), target.shape[1]), working_type(self.dtype))
            for others in self.places[:, self.grown.index[rows[last]]]:
                if (others >= 0).any():
                    total[others >= 0] += self._of_rows(others[others >= 0])
            self._put(target, (consecutive(last), slice(None)), -total)

    def _of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The noise on whole rows of the target."""
        return self._values(self.draws[0].of(rows), self.deviations[rows][:, None])

    def _values(self, draws: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        """Normal numbers of these deviations, which broadcast with `draws`."""
        if not is_short(self.dtype):
            return (normal(draws) * deviations).astype(working_type(self.dtype), copy=False)
        first = float(deviations.flat[0])
        if (deviations == first).all():
            return lookup(normal_numbers(first), draws)
        return lookup(quantiles(), draws) * deviations

    def _put(self, target: np.ndarray, where: tuple[slice | np.ndarray, slice | np.ndarray], values: np.ndarray) -> None:
        part = np.ascontiguousarray(target[where]) if any(isinstance(index, np.ndarray) for index in where) else target[where]
        add(part, values, self.dtype)
        if not np.may_share_memory(part, target):
            target[where] = part
