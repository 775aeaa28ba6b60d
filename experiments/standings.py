"""Standings of a selection: who goes on from a rung, who wins, and what choosing took."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from statistics import fmean
from typing import Any

from outgrow.experiments.cost import half_interval
from outgrow.experiments.runs import Run


@dataclass(frozen=True)
class Standing:
    """A candidate after a rung: losses in nats/token and FLOPs of one run, by seed.

    Attributes:
        start: the losses right after growth.
        flops: of its training from the very beginning.
        operator_flops: of what was learned before it.
    """

    label: str
    start: tuple[float, ...]
    losses: tuple[float, ...]
    flops: tuple[float, ...]
    operator_flops: tuple[float, ...]

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def cost(self) -> float:
        """FLOPs of all its runs."""
        trained = sum(self.flops)
        learned = sum(self.operator_flops)
        return trained + learned

    @classmethod
    def of(cls, label: str, runs: Sequence[Run]) -> Standing:
        return cls(
            label,
            start=tuple(run.curve.losses[0] for run in runs),
            losses=tuple(run.final_loss for run in runs),
            flops=tuple(run.flops for run in runs),
            operator_flops=tuple(run.operator_flops for run in runs),
        )


def ranked(standings: Sequence[Standing]) -> list[Standing]:
    """The best first; of those that tie with the best one left, the cheapest."""
    left = sorted(standings, key=attrgetter("loss", "cost"))
    order: list[Standing] = []
    while left:
        best = left[0]
        alike = [standing for standing in left if ties(standing, best)]
        chosen = min(alike, key=attrgetter("cost", "loss"))
        order.append(chosen)
        left.remove(chosen)
    return order


def ties(one: Standing, other: Standing) -> bool:
    """Check whether the 95 % interval of the difference, seed by seed, includes zero; of one seed, whether
    the losses are equal.
    """
    pairs = zip(one.losses, other.losses, strict=True)
    differences = [mine - theirs for mine, theirs in pairs]
    half = half_interval(differences) or 0.0
    return abs(fmean(differences)) <= half


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's; None of fewer than three, or where all of one are equal."""
    distinct = min(len(set(one)), len(set(other)))
    if len(one) < 3 or distinct == 1:
        return None
    from scipy.stats import spearmanr  # takes a second to import

    result = spearmanr(one, other)
    return float(result.statistic)


@dataclass(frozen=True)
class Dropped:
    """A candidate that diverged on its way to a rung.

    Attributes:
        flops: of its runs, as far as they came, from their very beginning.
        operator_flops: of what was learned before them.
    """

    label: str
    reason: str
    flops: float
    operator_flops: float


@dataclass(frozen=True)
class Rung:
    """Standings after `tokens`, the best first, how many went on, and who diverged before."""

    tokens: int
    standings: tuple[Standing, ...]
    kept: int
    diverged: tuple[Dropped, ...] = ()


@dataclass(frozen=True)
class Selection:
    """All rungs of a selection."""

    study: str
    rungs: tuple[Rung, ...]

    @property
    def winner(self) -> Standing:
        last_rung = self.rungs[-1]
        return last_rung.standings[0]

    @property
    def last(self) -> list[Standing]:
        """The last standing of each candidate, the winner first."""
        ends: dict[str, Standing] = {}
        for rung in reversed(self.rungs):
            for one in rung.standings:
                ends.setdefault(one.label, one)
        return list(ends.values())

    @property
    def diverged(self) -> dict[str, Dropped]:
        """The candidates that diverged, by label."""
        dropped = itertools.chain.from_iterable(rung.diverged for rung in self.rungs)
        return {candidate.label: candidate for candidate in dropped}

    @property
    def correlations(self) -> list[dict[str, Any]]:
        """Rank correlation of each column of losses with the next, over the candidates that have both."""
        columns = self._columns
        rows = []
        for before, after in itertools.pairwise(columns):
            earlier_losses = columns[before]
            later_losses = columns[after]
            both = list(later_losses)
            earlier = [earlier_losses[label] for label in both]
            later = [later_losses[label] for label in both]
            rho = rank_correlation(earlier, later)
            row = {"from": before, "to": after, "candidates": len(both), "spearman": rho}
            rows.append(row)
        return rows

    @property
    def _columns(self) -> dict[str, dict[str, float]]:
        """Losses by candidate: right after growth, and after each rung."""
        first_rung = self.rungs[0]
        starts = {standing.label: fmean(standing.start) for standing in first_rung.standings}
        columns = {"right after growth": starts}
        for rung in self.rungs:
            losses = {standing.label: standing.loss for standing in rung.standings}
            columns[f"{rung.tokens:,} tokens"] = losses
        return columns

    @property
    def ledger(self) -> dict[str, Any]:
        """FLOPs that choosing took: of all, and of those that lost, which the winner's own ledger has not."""
        costs: dict[str, dict[str, float]] = {}
        total = 0.0
        for standing in self.last:
            trained = sum(standing.flops)
            learned = sum(standing.operator_flops)
            costs[standing.label] = {"flops": trained, "operator_flops": learned}
            total += standing.cost
        for label, dropped in self.diverged.items():  # further than where it last stood
            counted = costs.get(label, {})
            own = {"flops": dropped.flops, "operator_flops": dropped.operator_flops}
            costs[label] = own
            further = sum(own.values()) - sum(counted.values())
            total += further

        losers = total - self.winner.cost
        return {"flops": total, "losers_flops": losers, "candidates": costs}

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "study": self.study,
            "winner": self.winner.label,
            "rungs": [asdict(rung) for rung in self.rungs],
            "correlations": self.correlations,
            "ledger": self.ledger,
        }
