"""The arithmetic of a convergence claim: curves, crossings, costs, intervals.

Numbers in, numbers out; no files.

Everything follows the ledger's rules: cost in FLOPs counted from the model, read at scratch's final
validation loss, with the source excluded and included; S = C_scratch / C_grown; saving = 1 − 1/S. A speed-up
and a saving are two words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal, TypeVar

K = TypeVar("K", float, tuple[float, int], tuple[float, int, int])
Outcome = Literal["reached", "starts below", "not reached"]
LEAST_SEEDS = 3  # that a headline number takes
VERDICTS = ("lower", "higher", "no change that the seeds can tell")
# a curve that ends within 1 % of the wanted cost is read at its end: budgets are whole batches
AT_THE_END = 0.01


@dataclass(frozen=True)
class Curve:
    """Validation losses (nats/token) of one run or of a mean over seeds, against its own training tokens and
    FLOPs.
    """

    tokens: tuple[float, ...]
    flops: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of one arm to reach scratch's final loss, or the reason why no ratio can be given.

    FLOPs include the operator's own steps; `_included` adds the source's. None: undefined, or the source's
    cost is unknown. The loss differences (arm − scratch's final loss, nats; negative is better) are read
    where both have paid the same FLOPs, None where the arm ended before that; and at the arm's own end.
    """

    outcome: Outcome
    tokens: float | None
    flops_excluded: float | None
    flops_included: float | None
    speedup_excluded: float | None
    speedup_included: float | None
    difference_excluded: float | None
    difference_included: float | None
    difference_at_end: float

    @property
    def saving_excluded(self) -> float | None:
        return saving(self.speedup_excluded)

    @property
    def saving_included(self) -> float | None:
        return saving(self.speedup_included)


def saving(speedup: float | None) -> float | None:
    """1 − 1/S: the share of scratch's FLOPs that need not be paid; negative when the arm pays more."""
    return None if speedup is None else 1.0 - 1.0 / speedup


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds, evaluation by evaluation.

    Raises ValueError unless all were evaluated at the same tokens.
    """
    first = curves[0]
    if any(curve.tokens != first.tokens for curve in curves):
        raise ValueError("curves of one arm were evaluated at different tokens")
    columns = zip(*(curve.losses for curve in curves), strict=True)
    losses = tuple(map(fmean, columns))
    return Curve(first.tokens, first.flops, losses)


def reach(positions: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """The position at which the curve comes down to `level` for good, linear in between.

    None if it ends above.

    A dip that rises again reaches nothing: what it cost to get there is not what it costs to stay.
    """
    above = [i for i, loss in enumerate(losses) if loss > level]
    if not above:
        return positions[0]
    i = above[-1] + 1
    if i == len(losses):
        return None
    before = losses[i - 1]
    after = losses[i]
    start = positions[i - 1]
    end = positions[i]
    share = (before - level) / (before - after)
    return start + share * (end - start)


def loss_at(positions: Sequence[float], losses: Sequence[float], at: float) -> float | None:
    """The curve's loss at one cost, linear between evaluations; None before its start or past its end."""
    first = positions[0]
    last = positions[-1]
    if at < first or at > last * (1 + AT_THE_END):
        return None
    return interpolate(at, positions, losses)


def interpolate(at: float, positions: Sequence[float], values: Sequence[float]) -> float:
    """Interpolate linearly between the two rising positions around `at`; past the last, its value."""
    points = zip(positions, values, strict=True)
    for (start, before), (end, after) in pairwise(points):
        if at <= end:
            share = (at - start) / (end - start)
            return before + share * (after - before)
    return values[-1]


def half_interval(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half the width of the mean's confidence interval, Student t with n − 1 degrees of freedom.

    None for one value.
    """
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # half a second to import, and only wanted here

    count = len(values)
    below = 0.5 + level / 2
    quantile = float(stdtrit(count - 1, below))
    return quantile * stdev(values) / math.sqrt(count)


def best_of(grid: Mapping[K, Mapping[int, float]]) -> K:
    """The key, such as a learning rate, with the lowest mean of its losses by seed.

    The seeds that all keys share count; where none is shared, each key's own. Of equals the smallest key.
    """
    shared = set.intersection(*(set(losses) for losses in grid.values()))

    def mean_loss(key: K) -> float:
        losses = grid[key]
        return fmean(losses[seed] for seed in shared or losses)

    return min(sorted(grid), key=mean_loss)


def undecided(seeds: int) -> str:
    """A clause for a headline of too few seeds, which decide nothing; "" where they are enough."""
    if seeds >= LEAST_SEEDS:
        return ""
    return "one seed: not decided" if seeds == 1 else f"{seeds} seeds: not decided"


def verdict(difference: float, interval: float | None) -> str:
    """A change in words; one that its interval does not tell from none is called so."""
    lower, higher, unclear = VERDICTS
    if interval is None or abs(difference) <= interval:
        return unclear
    return lower if difference < 0 else higher


def cost(
    curve: Curve,
    scratch: Curve,
    *,
    operator_flops: float = 0.0,
    source_flops: float | None = 0.0,
) -> Cost:
    """Compare one arm's curve with scratch's.

    C_scratch is where scratch's own curve reaches its final loss for good: the rule every arm is read by. An
    arm that starts and ends there paid nothing, so it gets no ratio with the source excluded, only the loss
    difference. One that ends above has not reached it.
    """
    level = scratch.losses[-1]
    paid_by_scratch = scratch.flops[-1]
    c_scratch = reach(scratch.flops, scratch.losses, level)
    begin = curve.losses[0]
    end = curve.losses[-1]
    starts_below = max(begin, end) <= level
    tokens: float | None = curve.tokens[0]
    own: float | None = curve.flops[0]
    if not starts_below:
        tokens = reach(curve.tokens, curve.losses, level)
        own = reach(curve.flops, curve.losses, level)
    excluded = None if own is None else own + operator_flops
    included = _sum(excluded, source_flops)

    def difference(already_paid: float | None) -> float | None:
        if already_paid is None:
            return None
        own = paid_by_scratch - already_paid
        loss = loss_at(curve.flops, curve.losses, own)
        return None if loss is None else loss - level

    outcome: Outcome = "reached"
    if starts_below:
        outcome = "starts below"
    elif own is None:
        outcome = "not reached"
    return Cost(
        outcome=outcome,
        tokens=tokens,
        flops_excluded=excluded,
        flops_included=included,
        speedup_excluded=None if starts_below else _ratio(c_scratch, excluded),
        speedup_included=_ratio(c_scratch, included),
        difference_excluded=difference(operator_flops),
        difference_included=difference(_sum(operator_flops, source_flops)),
        difference_at_end=end - level,
    )


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _ratio(c_scratch: float | None, c_arm: float | None) -> float | None:
    return c_scratch / c_arm if c_scratch is not None and c_arm else None
