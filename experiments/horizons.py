"""The effective speed-up of arms against scratch's curve of decayed losses: numbers in, numbers out.

Every run here has ended with its learning rate decayed (train/horizons.py gives an arm one such end for each
budget). Scratch's ends are a curve L(C): the loss that scratch reaches for C FLOPs. An arm that ends at loss
L for C_arm FLOPs is worth

    S = L⁻¹(L) / C_arm

interpolated linearly in log C between scratch's ends, never outside of them: there the loss difference at
equal FLOPs stands instead. A point that has not decayed is never held against one that has.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from outgrow.experiments.cost import half_interval
from outgrow.experiments.runs import SCRATCH, Run
from outgrow.model.base.errors import UserError
from outgrow.train.run.record import RunRecord

RECORD = "ends.json"  # the small record of a study's runs: what every table and picture is made of


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
    if schedule["name"] != "wsd" or not schedule.get("decay_fraction") or schedule["floor"] != 0.0:
        raise UserError(
            f"{run.folder}: its learning rate does not decay to zero, so its end is no end of a horizon "
            "(schedule=wsd)",
        )
    if run.source_flops is None:
        raise UserError(f"{run.folder}: nobody counted the FLOPs of its source; give source_tokens")
    return End(
        name=run.name,
        arm=run.arm,
        optimizer=str(run.record.setting("optimizer.name")),
        learning_rate=run.learning_rate,
        batch_tokens=int(run.record.setting("train.batch_tokens")),
        seed=run.seed,
        parameters=_multiplied(run.record),
        tokens=run.summary.tokens,
        flops=run.summary.flops + run.operator_flops,
        source_flops=run.source_flops,
        val_loss=run.summary.final_val_loss,
        eval_tokens=int(run.record.setting("train.eval_tokens")),
        device=str(run.record.device),
        data=run.record.data.fingerprint,
    )


def _multiplied(record: RunRecord) -> int:
    """The parameters of a run's network without its embedding table, which an untied head does not need."""
    config = record.target_config
    table = 0 if config.get("tie_word_embeddings") else int(config["vocab_size"]) * int(config["hidden_size"])
    return record.parameters - table


def check_alike(ends: Sequence[End]) -> None:
    """Refuse ends that were not measured on the same text.

    Raises:
        UserError: naming what differs.
    """
    faults = []
    for key in ("data", "eval_tokens"):
        values = sorted({str(getattr(end, key)) for end in ends})
        if len(values) > 1:
            short = ", ".join(value[:12] for value in values)
            faults.append(f"{key}: {len(values)} different ones ({short}); compare runs on one text only")
    if not any(end.arm == SCRATCH for end in ends):
        faults.append(
            f"no {SCRATCH} arm: there is no curve to hold the others against; run growth=scratch at two "
            "horizons or more",
        )
    UserError.collect(faults)


# ---- the best rate of each arm at each horizon -------------------------------------------------------------


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
        return self.tokens / self.parameters


def best_points(ends: Iterable[End]) -> list[Point]:
    """One point for each arm, optimizer and horizon, in the order of their names."""
    grids: dict[tuple[str, str, int], list[End]] = defaultdict(list)
    for end in ends:
        grids[end.arm, end.optimizer, end.tokens].append(end)
    return [_best_point(grids[key]) for key in sorted(grids)]


def _best_point(ends: Sequence[End]) -> Point:
    """The point of one arm, optimizer and horizon whose `ends` are those of every rate, batch and seed."""
    grid: dict[tuple[float, int], list[End]] = defaultdict(list)
    for end in ends:
        grid[end.learning_rate, end.batch_tokens].append(end)
    losses = {key: fmean(end.val_loss for end in seeds) for key, seeds in grid.items()}
    rate, batch = min(losses, key=losses.__getitem__)
    rates = sorted(tried for tried, size in grid if size == batch)
    edges = {rates[0], rates[-1]}
    best = grid[rate, batch]
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
class BaselineCurve:
    """L(C) from the decayed ends of scratch: costs rise, losses fall."""

    flops: tuple[float, ...]
    losses: tuple[float, ...]

    def cost_of(self, loss: float) -> float | None:
        """L⁻¹: the FLOPs for which scratch reaches `loss`; None outside of what was measured."""
        if not self.losses[-1] <= loss <= self.losses[0]:
            return None
        rising = [-value for value in self.losses]
        costs = list(map(math.log, self.flops))
        return math.exp(_interpolate(-loss, rising, costs))

    def loss_at(self, flops: float) -> float | None:
        """L: scratch's loss for `flops`; None outside of what was measured."""
        if not self.flops[0] <= flops <= self.flops[-1]:
            return None
        return _interpolate(math.log(flops), list(map(math.log, self.flops)), self.losses)


def _interpolate(at: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Linear between the two places around `at`; places rise."""
    for i in range(1, len(places)):
        start, end = places[i - 1], places[i]
        if at <= end:
            before, after = values[i - 1], values[i]
            share = (at - start) / (end - start)
            return before + share * (after - before)
    return values[-1]


def baseline(points: Iterable[Point]) -> BaselineCurve:
    """Scratch's lower envelope: of all its optimizers, what gives the lowest loss for at most these FLOPs.

    Raises:
        UserError: fewer than two such points.
    """
    candidates = sorted((point.flops, point.val_loss) for point in points if point.arm == SCRATCH)
    kept: list[tuple[float, float]] = []
    for flops, loss in candidates:
        if kept and flops == kept[-1][0]:
            continue  # the same cost at a higher loss
        if not kept or loss < kept[-1][1]:
            kept.append((flops, loss))
    if len(kept) < 2:
        raise UserError(
            f"{SCRATCH}: {len(kept)} horizons with falling losses; a curve needs two or more "
            "(schedule.horizons)",
        )
    costs, losses = zip(*kept, strict=True)
    return BaselineCurve(costs, losses)


@dataclass(frozen=True)
class Worth:
    """One arm at one horizon against scratch.

    `interval` is half of a 95 % interval of S over the seeds; None for one seed.
    """

    point: Point
    speedup_excluded: float | None
    speedup_included: float | None
    interval_included: float | None
    difference: float | None  # loss − scratch's at equal FLOPs, source included; nats, negative is better


def worths(ends: Sequence[End], against: Callable[[Point], bool] = lambda point: True) -> list[Worth]:
    """The worth of every arm at every horizon.

    Args:
        against: the points of scratch that are the baseline, such as those of one optimizer.

    Raises:
        UserError: the ends are of different texts, or scratch has no curve.
    """
    check_alike(ends)
    points = best_points(ends)
    curve = baseline(point for point in points if against(point))
    return [_worth(point, curve) for point in points]


def _worth(point: Point, curve: BaselineCurve) -> Worth:
    cost, usual = curve.cost_of(point.val_loss), curve.loss_at(point.paid)
    own = [(curve.cost_of(end.val_loss), end.paid) for end in point.ends]
    seeds = [scratch / paid for scratch, paid in own if scratch is not None]
    return Worth(
        point,
        speedup_excluded=None if cost is None else cost / point.flops,
        speedup_included=None if cost is None else cost / point.paid,
        interval_included=half_interval(seeds) if len(seeds) == len(point.ends) else None,
        difference=None if usual is None else point.val_loss - usual,
    )


# ---- the record --------------------------------------------------------------------------------------------


def write_ends(path: Path, ends: Iterable[End]) -> None:
    """The ends as JSON, sorted, so that a study's record changes by what was added."""
    ordered = sorted(ends, key=lambda end: (end.arm, end.optimizer, end.tokens, end.name))
    rows = list(map(asdict, ordered))
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


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
    return End(**{field.name: row[field.name] for field in fields(End)})
