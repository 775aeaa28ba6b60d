"""The comparison of run folders: the best learning rate of each arm, the grid, the cost to reach scratch.

outgrow compare runs/tiny-*      seconds; prints the table, writes it with convergence.png and report.html
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from outgrow.experiments.changes import Change, changes
from outgrow.experiments.comparable import check_comparable, differences
from outgrow.experiments.cost import Cost, Curve, best_of, cost, half_interval, mean_curve, undecided
from outgrow.experiments.runs import CONTROLS, SCRATCH, SOURCE, ArmRate, LeftOut, Run, read_runs
from outgrow.model.base.errors import UserError

METHOD = (
    "All arms train on the same batches of one data set. They train the same target, but for the controls "
    "(source, null_control), which train the source's own, smaller network. Validation text is held out by "
    "document and is the same in every evaluation. A cost is read where the arm's mean curve comes down for "
    "good to scratch's final loss (mean over seeds, best learning rate), linear in the loss between two "
    "evaluations; a dip that rises above it again counts for nothing, and an arm that ends above has not "
    "reached it; scratch is read by the same rule. FLOPs are counted from the model, attention included, "
    "for the tokens really processed, plus the operator's own steps and a teacher's forward passes; a run "
    "that grows on its way pays for the network it has at each step, and for no gradient of what is frozen. "
    "S = C_scratch / C_arm; saving = 1 − 1/S. Source excluded: the checkpoint was already there. Source "
    "included: it had to be trained first. Loss at equal FLOPs: the arm's loss where it has paid what "
    "scratch paid in all, minus scratch's final loss (negative is better). Where an arm is read before the "
    "end of its own schedule, its learning rate has not yet decayed as far as scratch's had: that is to the "
    "arm's disadvantage. Intervals are 95 %, Student t over seeds; a saving's interval holds each seed "
    "against scratch's run of the same seed. A change is the mean difference of final losses over pairs of "
    "one seed; no interval is corrected for how many are looked at."
)


@dataclass(frozen=True)
class Row:
    """One arm at one learning rate, over its seeds. Losses in nats/token; see `ledger.Cost` for the costs."""

    arm: str
    learning_rate: float
    # of this arm's learning rates, the one with the lowest mean final loss over the seeds they share
    best: bool
    seeds: tuple[int, ...]
    start_loss: float
    final_loss: float
    final_loss_interval: float | None
    bits_per_byte: float
    tokens: float  # trained by each run of this row
    flops: float
    operator_flops: float
    source_tokens: float | None
    source_flops: float | None
    cost: Cost
    seed_savings: tuple[float, ...]  # source excluded; empty unless every seed reaches its own scratch's loss
    receipt: float | None
    lossless: bool | None

    @property
    def n(self) -> int:
        return len(self.seeds)

    @property
    def point(self) -> ArmRate:
        """The arm and its learning rate, which the runs of a row share."""
        return self.arm, self.learning_rate

    @property
    def is_scratch(self) -> bool:
        """Check for the arm that the others are held against."""
        return self.arm == SCRATCH

    @property
    def saving_interval(self) -> float | None:
        return half_interval(self.seed_savings)


@dataclass(frozen=True)
class Comparison:
    """The result of comparing runs.

    `rows` holds the whole grid, best rows first, lowest final loss first.
    """

    study: str
    rows: tuple[Row, ...]
    scratch_curve: Curve
    curves: dict[ArmRate, Curve]  # mean over seeds
    changes: tuple[Change, ...]
    differences: tuple[str, ...]  # settings beside the growth in which the arms differ
    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    machine: str

    @property
    def best_rows(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.best)

    @property
    def scratch(self) -> Row:
        return next(row for row in self.best_rows if row.is_scratch)

    def runs_of(self, row: Row) -> tuple[Run, ...]:
        """The runs of one row, one for each seed."""
        return tuple(run for run in self.runs if run.point == row.point)


def compare(folders: Iterable[str | Path]) -> Comparison:
    """Read, check and compare run folders. Raises UserError when they cannot be compared."""
    runs, left_out = read_runs(folders)
    check_comparable(runs)
    groups = by_rate(runs)
    curves = {key: _mean_curve(group) for key, group in groups.items()}
    best = best_learning_rates(groups)
    baseline = (SCRATCH, best[SCRATCH])
    scratch = groups[baseline]
    scratch_curve = curves[baseline]
    rows = []
    for key, group in groups.items():
        arm, rate = key
        curve = curves[key]
        is_best = rate == best[arm]
        row = _row(group, curve, is_best, scratch, scratch_curve)
        rows.append(row)
    rows.sort(key=lambda row: (not row.best, row.final_loss))
    tuned = {arm: groups[arm, rate] for arm, rate in best.items()}
    effects = changes(tuned)
    stated: list[tuple[str, str]] = []
    for change in effects:
        stated += [(change.arm, key) for key in change.settings]
    studies = {run.study for run in runs}
    return Comparison(
        study=", ".join(sorted(studies)),
        rows=tuple(rows),
        scratch_curve=scratch_curve,
        curves=curves,
        changes=effects,
        differences=tuple(differences(runs, stated)),
        runs=tuple(runs),
        left_out=tuple(left_out),
        notes=tuple(_notes(rows, runs, left_out)),
        machine=machine(runs),
    )


def by_rate(runs: Iterable[Run]) -> dict[ArmRate, list[Run]]:
    """The runs of each arm at each learning rate, by seed."""
    groups: dict[ArmRate, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        groups[run.point].append(run)
    return {key: groups[key] for key in sorted(groups)}


def best_learning_rates(groups: Mapping[ArmRate, Sequence[Run]]) -> dict[str, float]:
    """The learning rate of every arm with the lowest mean final loss over the seeds that all its rates share.

    So a lucky seed that one rate alone was run with decides nothing. Where no seed is shared, each rate's own
    seeds count; of two equals the smaller rate is taken.
    """
    grids: dict[str, dict[float, dict[int, float]]] = defaultdict(dict)  # arm → rate → seed → final loss
    for (arm, rate), group in groups.items():
        grids[arm][rate] = {run.seed: run.final_loss for run in group}
    return {arm: best_of(grid) for arm, grid in grids.items()}


def _mean_curve(group: Sequence[Run]) -> Curve:
    curves = [run.curve for run in group]
    try:
        return mean_curve(curves)
    except ValueError as error:
        paths = [str(run.folder) for run in group]
        folders = " and ".join(paths)
        raise UserError(f"{folders}: {error}; their metrics.jsonl was edited, run them again") from error


def _row(group: Sequence[Run], curve: Curve, best: bool, scratch: Sequence[Run], scratch_curve: Curve) -> Row:
    first = group[0]
    finals = [run.final_loss for run in group]
    sources = [run.source for run in group]
    source_tokens = _mean_or_none([0 if source is None else source.tokens for source in sources])
    source_flops = _mean_or_none([run.source_flops for run in group])
    operator_flops = fmean(run.operator_flops for run in group)
    deltas = (run.record.start.max_delta for run in group)
    receipts = [delta for delta in deltas if delta is not None]
    return Row(
        arm=first.arm,
        learning_rate=first.learning_rate,
        best=best,
        seeds=tuple(run.seed for run in group),
        start_loss=curve.losses[0],
        final_loss=curve.losses[-1],
        final_loss_interval=half_interval(finals),
        bits_per_byte=fmean(run.summary.bits_per_byte for run in group),
        tokens=curve.tokens[-1],
        flops=curve.flops[-1],
        operator_flops=operator_flops,
        source_tokens=source_tokens,
        source_flops=source_flops,
        cost=cost(curve, scratch_curve, operator_flops=operator_flops, source_flops=source_flops),
        seed_savings=_seed_savings(group, scratch),
        receipt=max(receipts, default=None),
        lossless=first.record.start.lossless,
    )


def _seed_savings(group: Sequence[Run], scratch: Sequence[Run]) -> tuple[float, ...]:
    """Each seed against scratch's run of the same seed, source excluded; () unless all of them have a
    ratio."""
    by_seed = {run.seed: run for run in scratch}
    savings: list[float] = []
    for run in group:
        if run.seed not in by_seed:
            return ()
        baseline = by_seed[run.seed].curve
        paid = cost(run.curve, baseline, operator_flops=run.operator_flops)
        if paid.saving_excluded is None:
            return ()
        savings.append(paid.saving_excluded)
    return tuple(savings)


def _mean_or_none(values: Sequence[Any]) -> float | None:
    return None if None in values else fmean(values)


def _notes(rows: Sequence[Row], runs: Sequence[Run], left_out: Sequence[LeftOut]) -> list[str]:
    """Everything a reader should know before believing the table."""
    notes = [folder.note for folder in left_out]
    best = [row for row in rows if row.best]
    notes += _notes_on_seeds(best)
    notes += _notes_on_tuning(rows)
    notes += _notes_on_control(best)
    origins = [run.source for run in runs if run.source]
    sources = {replace(source, path=None) for source in origins}
    if len(sources) > 1:
        notes.append(
            f"the runs start from {len(sources)} different sources; the source's cost is the mean of an "
            "arm's own",
        )
    notes += [
        f"{row.arm}: its source's FLOPs are unknown, so nothing with the source included"
        for row in best
        if row.source_flops is None
    ]
    devices = {str(run.record.device) for run in runs}
    if len(devices) > 1:
        names = ", ".join(sorted(devices))
        notes.append(f"the runs were made on different devices ({names}): compare no seconds")
    return notes


def _notes_on_control(best: Sequence[Row]) -> list[str]:
    """A note on the arms that the source arm, only trained longer and not bigger, is as good as."""
    controls = [row for row in best if row.arm == SOURCE]
    if not controls:
        return [f"no {SOURCE} arm: nothing here separates a bigger model from one that was trained longer"]
    level = controls[0].final_loss
    losing = [row.arm for row in grown(best) if row.final_loss >= level]
    if not losing:
        return []
    end = f"ends at {level:.3f} after the same FLOPs, lower than or equal to"
    names = ", ".join(losing)
    return [f"the {SOURCE} arm, trained longer and not bigger, {end}: {names}"]


def grown(rows: Sequence[Row]) -> list[Row]:
    """The rows of the arms that grow from a source."""
    return [row for row in rows if row.arm not in (SCRATCH, *CONTROLS)]


def _notes_on_seeds(best: Sequence[Row]) -> list[str]:
    notes = []
    few = [row.arm for row in best if row.n < 3]
    if few:
        notes.append(f"fewer than 3 seeds ({', '.join(few)}): an impression, no headline number")
    different = {row.seeds for row in best}
    if len(different) > 1:
        parts = [f"{row.arm} {_list(row.seeds)}" for row in best]
        notes.append("the arms have different seeds: " + "; ".join(parts))
    return notes


def _notes_on_tuning(rows: Sequence[Row]) -> list[str]:
    """A best learning rate at the edge of its grid may not be the best; one learning rate is no grid."""
    rates: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        rates[row.arm].append(row.learning_rate)
    notes = []
    alone = [arm for arm, grid in sorted(rates.items()) if len(grid) == 1]
    if alone:
        notes.append(f"one learning rate only, not tuned here: {', '.join(alone)}")
    for row in rows:
        grid = sorted(rates[row.arm])
        edges = grid[0], grid[-1]
        is_grid = len(grid) > 1
        if row.best and is_grid and row.learning_rate in edges:
            notes.append(
                f"{row.arm}: the best learning rate, {row.learning_rate:g}, is at the edge of its grid "
                f"({_list(grid)}): widen it",
            )
    return notes


def machine(runs: Sequence[Run]) -> str:
    """The devices, threads and library versions the runs name."""
    records = [run.record for run in runs]
    machines = {f"{record.device}, threads {record.threads}, {record.precision}" for record in records}
    versions = sorted(records[0].versions.items())
    libraries = [f"{name} {version}" for name, version in versions]
    devices = "; ".join(sorted(machines))
    return ", ".join([devices, *libraries])


def answer(comparison: Comparison) -> str:
    """The finding in one sentence, source excluded and included side by side, computed from the rows; too few
    seeds stand in the same sentence.
    """
    rows = grown(comparison.best_rows)
    if not rows:
        return "no grown arm was compared"
    row, sentence = _finding(rows, comparison.scratch)
    doubt = undecided(min(row.n, comparison.scratch.n))
    return f"{sentence}; {doubt}" if doubt else sentence


def _finding(rows: Sequence[Row], scratch: Row) -> tuple[Row, str]:
    """The row that the finding is about, and the finding."""
    below = [row for row in rows if row.cost.outcome == "starts below"]
    reached = [row for row in rows if row.cost.outcome == "reached"]
    if reached and not below:
        row = max(reached, key=lambda row: row.cost.speedup_excluded or 0.0)
        saving = percent(row.cost.saving_excluded or 0.0)
        paired = set(row.seeds) <= set(scratch.seeds)
        in_every_seed = row.seed_savings or row.n == 1 or not paired
        seeds = "" if in_every_seed else " in the mean, though not in every seed,"
        reaches = f"{row.arm} reaches scratch's final loss{seeds}"
        return row, f"{reaches} with {saving} FLOPs ({_with_source(row)})"
    row = min(below or rows, key=lambda row: row.final_loss)
    gap = _nats(row.final_loss - scratch.final_loss)
    if below:
        source = _with_source(row)
        return row, f"{row.arm} starts below scratch's final loss and ends {gap} it ({source})"
    return row, f"no grown arm reaches scratch's final loss; the nearest, {row.arm}, ends {gap} it"


def _with_source(row: Row) -> str:
    """A clause on the source's cost, after a saving without it."""
    if row.source_flops == 0.0:
        return "it has no source to pay for"
    included = row.cost.saving_included
    if included is None:
        return "source excluded; its cost is unknown"
    return f"source excluded; {percent(included)} FLOPs with it included"


UNLIKE = (
    "Not like with like: beside the growth, the arms differ in settings, and what each of them does cannot "
    "be told apart here"
)


def percent(share: float) -> str:
    """0.41 → '41 % fewer', −0.12 → '12 % more'."""
    size = f"{abs(share):.0%}".replace("%", " %")
    direction = "fewer" if share >= 0 else "more"
    return f"{size} {direction}"


def _nats(difference: float) -> str:
    side = "below" if difference < 0 else "above"
    return f"{abs(difference):.3f} nats {side}"


def _list(values: Iterable[float]) -> str:
    short = [f"{value:g}" for value in values]
    return ", ".join(short)
