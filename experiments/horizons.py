"""The effective speed-up of arms against scratch's curve of decayed losses: numbers in, numbers out.

Every run here has ended with its learning rate decayed (train/horizons.py gives an arm one such end for each
budget). Scratch's ends are a curve L(C): the loss that scratch reaches for C FLOPs. An arm that ends at loss
L for C_arm FLOPs is worth

    S = L⁻¹(L) / C_arm

interpolated linearly in log C between scratch's ends, never outside of them: there S has a bound, for scratch
needs more than its last end cost to reach a lower loss, and less than its first one's for a higher. A point
that has not decayed is never held against one that has.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from outgrow.experiments.cost import best_of, half_interval, interpolate
from outgrow.experiments.ends import End, check_alike
from outgrow.experiments.runs import SCRATCH
from outgrow.model.base.errors import UserError

# ---- the best rate of each arm at each horizon -------------------------------------------------------------

Horizon = tuple[str, str, int]  # arm, optimizer, tokens


@dataclass(frozen=True)
class Point:
    """An arm at one horizon: the ends of all seeds at the rate and batch that gave it the lowest mean
    loss."""

    arm: str
    optimizer: str
    tokens: int
    learning_rate: float
    batch_tokens: int
    ends: tuple[End, ...]
    at_edge: bool  # of the rates that were tried

    @property
    def val_loss(self) -> float:
        return fmean(end.val_loss for end in self.ends)

    @property
    def flops(self) -> float:
        return fmean(end.flops for end in self.ends)

    @property
    def paid(self) -> float:
        return fmean(end.paid for end in self.ends)

    @property
    def parameters(self) -> int:
        return self.ends[0].parameters

    def cost(self, *, source_paid: bool) -> float:
        """FLOPs with the training of the source counted, or left out."""
        return self.paid if source_paid else self.flops

    @property
    def tokens_per_parameter(self) -> float:
        return self.ends[0].tokens_per_parameter


def best_points(ends: Iterable[End]) -> list[Point]:
    """One point for each arm, optimizer and horizon, in the order of their names."""
    grids: dict[Horizon, list[End]] = defaultdict(list)
    for end in ends:
        horizon = (end.arm, end.optimizer, end.tokens)
        grids[horizon].append(end)
    return [_best_point(grids[horizon]) for horizon in sorted(grids)]


def _best_point(ends: Sequence[End]) -> Point:
    """The point of one arm, optimizer and horizon whose `ends` are those of every rate, batch and seed.

    The seeds that all of them share decide, so that a lucky seed of one rate alone does not.
    """
    grid: dict[tuple[float, int], list[End]] = defaultdict(list)
    for end in sorted(ends, key=lambda end: end.seed):
        key = (end.learning_rate, end.batch_tokens)
        grid[key].append(end)
    losses: dict[tuple[float, int], dict[int, float]] = {}
    for key, of_key in grid.items():
        losses[key] = {end.seed: end.val_loss for end in of_key}
    best_key = best_of(losses)
    rate, batch = best_key
    rates = [tried for tried, size in grid if size == batch]
    edges = {min(rates), max(rates)}
    few_rates = len(rates) < 3
    best = grid[best_key]
    first = best[0]
    return Point(
        arm=first.arm,
        optimizer=first.optimizer,
        tokens=first.tokens,
        learning_rate=rate,
        batch_tokens=batch,
        ends=tuple(best),
        at_edge=few_rates or rate in edges,
    )


# ---- scratch's curve, and the worth of an arm on it --------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """The side of `value` on which a speed-up lies: ">" of a loss below scratch's last end, "<" of one above
    its first.
    """

    side: str
    value: float

    def __str__(self) -> str:
        return f"{self.side} {self.value:.2f}"


@dataclass(frozen=True)
class BaselineCurve:
    """L(C) from the decayed ends of scratch: costs rise, losses fall."""

    flops: tuple[float, ...]
    losses: tuple[float, ...]

    def cost_of(self, loss: float) -> float | None:
        """L⁻¹: the FLOPs for which scratch reaches `loss`; None outside of what was measured."""
        lowest = self.losses[-1]
        highest = self.losses[0]
        if not lowest <= loss <= highest:
            return None
        rising = [-value for value in self.losses]
        log_cost = interpolate(-loss, rising, self.log_flops)
        return math.exp(log_cost)

    def bound_of(self, loss: float, flops: float) -> Bound | None:
        """The bound of L⁻¹(loss) / flops outside of what was measured; None inside."""
        if loss < self.losses[-1]:
            return Bound(">", self.flops[-1] / flops)
        if loss > self.losses[0]:
            return Bound("<", self.flops[0] / flops)
        return None

    def loss_at(self, flops: float) -> float | None:
        """L: scratch's loss for `flops`; None outside of what was measured."""
        least = self.flops[0]
        most = self.flops[-1]
        if not least <= flops <= most:
            return None
        return interpolate(math.log(flops), self.log_flops, self.losses)

    def speedup(self, loss: float, flops: float) -> float | None:
        """S of a loss that was reached for `flops`; None outside of what was measured."""
        scratch_flops = self.cost_of(loss)
        if scratch_flops is None:
            return None
        return scratch_flops / flops

    def difference(self, loss: float, flops: float) -> float | None:
        """A loss minus scratch's for the same `flops`, in nats; None outside of what was measured."""
        scratch_loss = self.loss_at(flops)
        if scratch_loss is None:
            return None
        return loss - scratch_loss

    @property
    def log_flops(self) -> list[float]:
        """The costs on the scale on which the curve is linear between two ends."""
        return list(map(math.log, self.flops))


def baseline(points: Iterable[Point]) -> BaselineCurve:
    """Scratch's lower envelope: of all its optimizers, what gives the lowest loss for at most these FLOPs.

    Raises:
        UserError: fewer than two such points.
    """
    return curve_of(envelope(points))


def envelope(points: Iterable[Point]) -> list[Point]:
    """The points of scratch on its lower envelope, cheapest first.

    Raises:
        UserError: fewer than two such points.
    """
    own = [point for point in points if point.arm == SCRATCH]
    own.sort(key=lambda point: (point.flops, point.val_loss))  # of one cost, the lowest loss first
    lower: list[Point] = []
    lowest = math.inf
    for point in own:
        if point.val_loss < lowest:
            lower.append(point)
            lowest = point.val_loss
    if len(lower) < 2:
        raise UserError(
            f"{SCRATCH}: {len(lower)} horizons with falling losses; a curve needs two or more "
            "(schedule.horizons)",
        )
    return lower


def curve_of(points: Sequence[Point]) -> BaselineCurve:
    """L(C) through the mean losses of points whose costs rise and whose losses fall."""
    costs = tuple(point.flops for point in points)
    losses = tuple(point.val_loss for point in points)
    return BaselineCurve(costs, losses)


def curve_of_seeds(points: Sequence[Point], seeds: Collection[int]) -> BaselineCurve | None:
    """L(C) through the mean losses of these seeds, over the stretch of `points` that all of them have; None
    where that is fewer than two, one between lacks a seed, or the losses rise.
    """
    having = [number for number, point in enumerate(points) if _has(point, seeds)]
    if len(having) < 2:
        return None
    stretch = points[having[0] : having[-1] + 1]
    if len(stretch) > len(having):
        return None
    costs: list[float] = []
    losses: list[float] = []
    for point in stretch:
        own = [end for end in point.ends if end.seed in seeds]
        costs.append(fmean(end.flops for end in own))
        losses.append(fmean(end.val_loss for end in own))
    steps = itertools.pairwise(losses)
    falling = all(after < before for before, after in steps)
    return BaselineCurve(tuple(costs), tuple(losses)) if falling else None


def _has(point: Point, seeds: Collection[int]) -> bool:
    """Check whether all these seeds were run to this end."""
    own = {end.seed for end in point.ends}
    return own.issuperset(seeds)


@dataclass(frozen=True)
class SeedWorth:
    """One seed of an arm, against the curve of scratch's runs of the same seed where there is one.

    `speedup` has the source included; `difference` is in nats at equal FLOPs, negative is better.
    """

    seed: int
    val_loss: float
    speedup_excluded: float | None
    speedup: float | None
    difference: float | None


@dataclass(frozen=True)
class Speedup:
    """S by one way to count: a value, or else the bound that is known of it, and half of its interval."""

    value: float | None
    bound: Bound | None
    half: float | None

    @property
    def least(self) -> float:
        """The speed-up that is known to be reached."""
        if self.value is not None:
            return self.value
        if self.bound is None or self.bound.side != ">":
            return 0.0
        return self.bound.value


@dataclass(frozen=True)
class Worth:
    """One arm at one horizon against scratch: the mean of the arm's seeds on the curve of scratch's runs of
    the same seeds; on that of all its seeds where scratch lacks one of them.

    Intervals are over the seeds, each paired with scratch's own: half of 95 %, None for one seed and where
    scratch lacks one of them.
    """

    point: Point
    speedup_excluded: float | None
    speedup_included: float | None
    bound_excluded: Bound | None  # of a speed-up that is None
    bound_included: Bound | None
    interval_excluded: float | None
    interval_included: float | None
    difference: float | None  # loss − scratch's at equal FLOPs, source included; nats, negative is better
    difference_interval: float | None
    seeds: tuple[SeedWorth, ...]

    def speedup(self, *, source_paid: bool) -> Speedup:
        """S with the training of the source counted, or left out."""
        if source_paid:
            return Speedup(self.speedup_included, self.bound_included, self.interval_included)
        return Speedup(self.speedup_excluded, self.bound_excluded, self.interval_excluded)


def worths(ends: Sequence[End], against: Callable[[Point], bool] = lambda point: True) -> list[Worth]:
    """The worth of every arm at every horizon.

    Args:
        against: the points of scratch that are the baseline, such as those of one optimizer.

    Raises:
        UserError: the ends are of different texts, scratch has no curve, or there is no control.
    """
    check_alike(ends)
    points = best_points(ends)
    scratch = envelope(filter(against, points))
    return [_worth(point, scratch) for point in points]


def _worth(point: Point, scratch: Sequence[Point]) -> Worth:
    own_seeds = {end.seed for end in point.ends}
    curve = curve_of_seeds(scratch, own_seeds) or curve_of(scratch)
    loss = point.val_loss
    seeds = tuple(_seed_worth(end, scratch) for end in point.ends)
    return Worth(
        point,
        speedup_excluded=curve.speedup(loss, point.flops),
        speedup_included=curve.speedup(loss, point.paid),
        bound_excluded=curve.bound_of(loss, point.flops),
        bound_included=curve.bound_of(loss, point.paid),
        interval_excluded=_interval(seed.speedup_excluded for seed in seeds),
        interval_included=_interval(seed.speedup for seed in seeds),
        difference=curve.difference(loss, point.paid),
        difference_interval=_interval(seed.difference for seed in seeds),
        seeds=seeds,
    )


def _seed_worth(end: End, points: Sequence[Point]) -> SeedWorth:
    """One end against the curve of its own seed through scratch's `points`."""
    loss = end.val_loss
    curve = curve_of_seeds(points, {end.seed})
    if curve is None:
        return SeedWorth(end.seed, loss, None, None, None)
    excluded = curve.speedup(loss, end.flops)
    included = curve.speedup(loss, end.paid)
    difference = curve.difference(loss, end.paid)
    return SeedWorth(end.seed, loss, excluded, included, difference)


def _interval(values: Iterable[float | None]) -> float | None:
    """Half of the 95 % interval of the mean; None where a value is missing."""
    numbers: list[float] = []
    for value in values:
        if value is None:
            return None
        numbers.append(value)
    return half_interval(numbers)
