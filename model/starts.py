"""The initialisation of a class, as a distribution of each tensor's entries, without a tensor of its size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, eq=False)
class Start:
    """The library's own initialisation of one tensor.

    Attributes:
        quantiles: of its entries' distribution, rising, at the middles of equal shares; one where all entries
            are alike.
        places: the value of each entry, in the tensor's shape, where that depends on its place and not on
            chance (`A_log`).
    """

    quantiles: np.ndarray
    places: np.ndarray | None = None

    @property
    def mean(self) -> float:
        return float(self.quantiles.mean())

    @property
    def deviation(self) -> float:
        return float(self.quantiles.std())

    @cached_property
    def normal(self) -> tuple[float, float] | None:
        """Mean and deviation of a normal distribution; None where it is another one."""
        count = len(self.quantiles)
        step = max(1, count // 8)
        chosen = np.arange(count)[::step]
        few = self.quantiles[chosen]
        if self.places is not None or len(few) < 8:
            return None
        # Quantiles of a normal distribution are a straight line over the standard normal's.
        shares = (chosen + 0.5) / count
        standard = np.array([NormalDist().inv_cdf(share) for share in shares])
        slope, mean = np.polyfit(standard, few, 1)
        line = standard * slope + mean
        least = 1e-9 * slope
        distance = np.abs(line - few)
        if distance.max() > least:
            return None
        mean = 0.0 if abs(mean) < least else float(f"{mean:.12g}")
        return mean, float(f"{slope:.12g}")

    def __str__(self) -> str:
        if self.places is not None:
            return "by place"
        least = 1e-9 * self.deviation
        mean = 0.0 if abs(self.mean) < least else self.mean
        if len(self.quantiles) == 1:
            return f"{mean:.4g}"
        return f"{mean:.4g} ± {self.deviation:.4g}"

    def of(self, shares: np.ndarray) -> np.ndarray:
        """Look up the entries at shares of the distribution between 0 and 1, float64."""
        last = len(self.quantiles) - 1
        count = len(self.quantiles)
        places = shares * count - 0.5
        position = np.clip(places, 0, last)
        numbers = np.arange(count)
        return np.interp(position, numbers, self.quantiles)
