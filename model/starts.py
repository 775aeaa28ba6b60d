"""How a class starts its weights, as a distribution of each tensor's entries, without a tensor of its size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, eq=False)
class Start:
    """What the library's own initialisation puts into one tensor.

    Attributes:
        quantiles: of its entries' distribution, rising, at the middles of equal shares; one where all entries are alike.
        places: the value of each entry, in the tensor's shape, where that depends on its place and not on chance (`A_log`).
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
        few = self.quantiles[:: max(1, len(self.quantiles) // 8)]
        shares = (np.arange(len(self.quantiles))[:: max(1, len(self.quantiles) // 8)] + 0.5) / len(self.quantiles)
        if self.places is not None or len(few) < 8:
            return None
        standard = np.array([NormalDist().inv_cdf(share) for share in shares])
        slope, mean = np.polyfit(standard, few, 1)
        if np.abs(standard * slope + mean - few).max() > 1e-9 * slope:
            return None
        return (0.0 if abs(mean) < 1e-9 * slope else float(f"{mean:.12g}")), float(f"{slope:.12g}")

    def __str__(self) -> str:
        if self.places is not None:
            return "by place"
        mean = 0.0 if abs(self.mean) < 1e-9 * self.deviation else self.mean
        return f"{mean:.4g}" if len(self.quantiles) == 1 else f"{mean:.4g} ± {self.deviation:.4g}"

    def of(self, shares: np.ndarray) -> np.ndarray:
        """The entries at shares of the distribution between 0 and 1, float64."""
        place = np.clip(shares * len(self.quantiles) - 0.5, 0, len(self.quantiles) - 1)
        return np.interp(place, np.arange(len(self.quantiles)), self.quantiles)
