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
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from outgrow.experiments.cost import best_of, half_interval, interpolate
from outgrow.experiments.grown_run import Growth, read_growth
from outgrow.experiments.runs import RUN_AGAIN, SCRATCH, Run
from outgrow.model.base.errors import UserError
from outgrow.train.machine.regime import multiplied
from outgrow.train.run.folder import METRICS

RECORD = "ends.json"  # the small record of a study's runs: what every table and picture is made of
OPTIONAL = ("growth", "active")  # left out of the record where an end has none


@dataclass(frozen=True)
class End:
    """The decayed end of one run.

    FLOPs count from its very beginning, the trunk included; the source's stand apart.
    """

    name: str
    arm: str
    optimizer: str
    learning_rate: float
    batch_tokens: int
    seed: int
    parameters: int  # in matrices and the head: an embedding table multiplies nothing
    tokens: int
    flops: float
    source_flops: float
    val_loss: float
    eval_tokens: int
    device: str
    data: str  # fingerprint of the text
    growth: Growth | None = None  # inside the run, if it grew on its way
    active: int | None = None  # of the parameters, in a mixture of experts: those that each token meets

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens per parameter that a token meets, all of them but in a mixture of experts."""
        return self.tokens / (self.active or self.parameters)

    @property
    def paid(self) -> float:
        """FLOPs with the source's training included."""
        return self.flops + self.source_flops


def end_of(run: Run) -> End:
    """The end of a complete run.

    Raises:
        UserError: it has not decayed, or its source's cost is unknown.
    """
    schedule = run.record.settings["schedule"]
    decays = schedule["name"] == "wsd" and schedule.get("decay_fraction")
    if not decays or schedule["floor"] != 0.0:
        raise UserError(
            f"{run.folder}: its learning rate does not decay to zero, so its end is no end of a horizon "
            "(schedule=wsd)",
        )
    if run.source_flops is None:
        raise UserError(f"{run.folder}: nobody counted the FLOPs of its source; give source_tokens")
    record = run.record
    is_sparse = record.active < record.parameters
    return End(
        name=run.name,
        arm=run.arm,
        optimizer=str(run.record.setting("optimizer.name")),
        learning_rate=run.learning_rate,
        batch_tokens=int(run.record.setting("train.batch_tokens")),
        seed=run.seed,
        parameters=multiplied(record.target_config, record.parameters),
        tokens=run.summary.tokens,
        flops=run.summary.flops + run.operator_flops,
        source_flops=run.source_flops,
        val_loss=run.summary.final_val_loss,
        eval_tokens=int(run.record.setting("train.eval_tokens")),
        device=str(run.record.device),
        data=run.record.data.fingerprint,
        growth=read_growth(run.folder / METRICS, RUN_AGAIN),
        active=multiplied(record.target_config, record.active) if is_sparse else None,
    )


def check_alike(ends: Sequence[End]) -> None:
    """Refuse ends that were not measured on the same text, or lack an arm that a headline needs.

    Raises:
        UserError: naming what differs, and what is missing.
    """
    faults = text_faults(ends)
    arms = {end.arm for end in ends}
    if SCRATCH not in arms:
        faults.append(
            f"no {SCRATCH} arm: there is no curve to hold the others against; run growth=scratch at two "
            "horizons or more",
        )
    faults += batch_faults(ends)
    if SCRATCH in arms and lacks_control(ends):
        faults.append(
            "no control: every arm has as many parameters as scratch, so nothing tells a bigger network from "
            "one that was only trained longer; run the small network alone too (growth=scratch with the "
            "small target)",
        )
    UserError.collect(faults)


def text_faults(ends: Sequence[End]) -> list[str]:
    """List how the texts of the ends differ."""
    faults = []
    for key in ("data", "eval_tokens"):
        values = {str(getattr(end, key)) for end in ends}
        count = len(values)
        if count > 1:
            short = [value[:12] for value in sorted(values)]
            beginnings = ", ".join(short)
            faults.append(f"{key}: {count} different ones ({beginnings}); compare runs on one text only")
    return faults


def batch_faults(ends: Sequence[End]) -> list[str]:
    """List the arms with batches of a size that scratch was not given: it would be a baseline untuned."""
    scratch = {end.batch_tokens for end in ends if end.arm == SCRATCH}
    others: dict[str, set[int]] = defaultdict(set)
    for end in ends:
        if scratch and end.batch_tokens not in scratch:
            others[end.arm].add(end.batch_tokens)
    of_scratch = _listed(scratch)
    return [
        f"{arm}: batches of {_listed(sizes)} tokens, {SCRATCH}'s are of {of_scratch}; run {SCRATCH} with "
        f"train.batch_tokens={min(sizes)} too"
        for arm, sizes in others.items()
    ]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def lacks_control(ends: Sequence[End]) -> bool:
    """Check whether arms grew, and the small network was not trained on beside them."""
    largest = max(end.parameters for end in ends)
    has_small = any(end.parameters < largest for end in ends)
    grown = {end.arm for end in ends if end.parameters == largest} - {SCRATCH}
    return bool(grown) and not has_small


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
    best = grid[best_key]
    return Point(
        arm=best[0].arm,
        optimizer=best[0].optimizer,
        tokens=best[0].tokens,
        learning_rate=rate,
        batch_tokens=batch,
        ends=tuple(best),
        at_edge=len(rates) < 3 or rate in edges,
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


def curve_of_seed(points: Sequence[Point], seed: int) -> BaselineCurve | None:
    """L(C) through one seed's ends of the same points; None where a point lacks it, or its losses rise."""
    own: list[End] = []
    for point in points:
        own += [end for end in point.ends if end.seed == seed]
    costs = tuple(end.flops for end in own)
    losses = tuple(end.val_loss for end in own)
    steps = itertools.pairwise(losses)
    falling = all(after < before for before, after in steps)
    if len(own) < len(points) or not falling:
        return None
    return BaselineCurve(costs, losses)


@dataclass(frozen=True)
class SeedWorth:
    """One seed of an arm, against the curve of scratch's runs of the same seed where there is one.

    `speedup` has the source included; `difference` is in nats at equal FLOPs, negative is better.
    """

    seed: int
    val_loss: float
    speedup: float | None
    difference: float | None


@dataclass(frozen=True)
class Worth:
    """One arm at one horizon against scratch. Intervals are over the seeds, each paired with scratch's own:
    half of 95 %, None for one seed and where scratch lacks one of them.
    """

    point: Point
    speedup_excluded: float | None
    speedup_included: float | None
    bound_excluded: Bound | None  # of a speed-up that is None
    bound_included: Bound | None
    interval_included: float | None
    difference: float | None  # loss − scratch's at equal FLOPs, source included; nats, negative is better
    difference_interval: float | None
    seeds: tuple[SeedWorth, ...]


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
    curve = curve_of(scratch)
    scratch_flops = curve.cost_of(point.val_loss)
    scratch_loss = curve.loss_at(point.paid)
    seeds = tuple(_seed_worth(end, scratch) for end in point.ends)
    return Worth(
        point,
        speedup_excluded=None if scratch_flops is None else scratch_flops / point.flops,
        speedup_included=None if scratch_flops is None else scratch_flops / point.paid,
        bound_excluded=curve.bound_of(point.val_loss, point.flops),
        bound_included=curve.bound_of(point.val_loss, point.paid),
        interval_included=_interval(seed.speedup for seed in seeds),
        difference=None if scratch_loss is None else point.val_loss - scratch_loss,
        difference_interval=_interval(seed.difference for seed in seeds),
        seeds=seeds,
    )


def _seed_worth(end: End, points: Sequence[Point]) -> SeedWorth:
    """One end against the curve of its own seed through scratch's `points`."""
    curve = curve_of_seed(points, end.seed)
    if curve is None:
        return SeedWorth(end.seed, end.val_loss, None, None)
    scratch_flops = curve.cost_of(end.val_loss)
    scratch_loss = curve.loss_at(end.paid)
    return SeedWorth(
        end.seed,
        end.val_loss,
        speedup=None if scratch_flops is None else scratch_flops / end.paid,
        difference=None if scratch_loss is None else end.val_loss - scratch_loss,
    )


def _interval(values: Iterable[float | None]) -> float | None:
    """Half of the 95 % interval of the mean; None where a value is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return half_interval(known)


# ---- the record --------------------------------------------------------------------------------------------


def write_ends(path: Path, ends: Iterable[End]) -> None:
    """The ends as JSON, sorted, so that a study's record changes by what was added."""
    order = attrgetter("arm", "optimizer", "tokens", "name")
    ordered = sorted(ends, key=order)
    rows = list(map(asdict, ordered))
    for row in rows:
        for key in OPTIONAL:
            if row[key] is None:
                del row[key]
    text = json.dumps(rows, indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def read_ends(path: Path) -> list[End]:
    """The ends that `write_ends` wrote.

    Raises:
        UserError: the file is something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [_end(row) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not a record of runs ({error}); expected what `outgrow horizons` writes",
        ) from error


def _end(row: Mapping[str, Any]) -> End:
    names = [field.name for field in fields(End) if field.name not in OPTIONAL]
    values = {name: row[name] for name in names}
    grown = row.get("growth")
    growth = None if grown is None else Growth(**grown)
    return End(**values, growth=growth, active=row.get("active"))
