"""Choose an operator by its loss after a lag: successive halving over ways to start (LAG, 2406.02469).

outgrow select tiny_transfer lossless random_pad "lossless growth.depth=stack" lag_tokens=100000

Every candidate trains the lag on the same batches at the same constant rate; the better share goes on,
longer, until one is left. One that diverges with any seed is out. The loss right after growth says little of
the end, the loss after a lag more. A
rung is a study's pool of runs, and a longer one takes over the trunk of the shorter (`train.run.horizons`):
what is complete is skipped, and nothing is trained twice.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from outgrow.experiments.cost import half_interval
from outgrow.experiments.runs import SOURCE, LeftOut, Run, read_run
from outgrow.experiments.study_file import Arm, Job, Study, job_of, load_study, start_of
from outgrow.model.base.errors import Diverged, UserError, did_you_mean
from outgrow.model.base.settings import CONF, read
from outgrow.train.run import folder as folders

if TYPE_CHECKING:
    from outgrow.train.settings import Settings


# ---- what is asked -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A way to start: an arm of the study or a leaf of conf/growth, and what is changed in it."""

    name: str
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its name in files and tables: `lossless-depth_stack`."""
        changes = [override.rpartition(".")[2] for override in self.overrides]
        label = "-".join([self.name, *changes])
        label = label.replace("=", "_")
        return re.sub(r"[^\w.-]+", "", label)


@dataclass(frozen=True)
class Halving:
    """The course of a selection.

    Attributes:
        lag_tokens: of the first rung.
        keep: the share that goes on from a rung, and 1 / the factor from its tokens to the next one's.
        seeds: each trains every candidate.
    """

    lag_tokens: int
    keep: float = 0.5
    seeds: tuple[int, ...] = (0,)

    def rungs(self, candidates: int) -> list[tuple[int, int]]:
        """(tokens, how many go on from there) of each rung, until one is left."""
        rungs: list[tuple[int, int]] = []
        while candidates > 1:
            shrunk = self.keep ** len(rungs)
            tokens = round(self.lag_tokens / shrunk)
            share = math.ceil(candidates * self.keep)
            all_but_one = candidates - 1
            candidates = max(1, min(all_but_one, share))
            rungs.append((tokens, candidates))
        return rungs

    @property
    def faults(self) -> Iterator[str]:
        if self.lag_tokens <= 0:
            yield f"lag_tokens: must be positive; found {self.lag_tokens}"
        if not 0 < self.keep < 1:
            yield f"keep: a share between 0 and 1; found {self.keep}"
        distinct = set(self.seeds)
        if not distinct or len(distinct) < len(self.seeds):
            yield f"seeds: at least one, each once; found {list(self.seeds)}"


@dataclass(frozen=True)
class Question:
    """A selection as it is asked for; `overrides` are of all runs."""

    study: Study
    candidates: tuple[Candidate, ...]
    halving: Halving
    overrides: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        return Path("runs") / f"select-{self.study.name}"


def question(study: str, words: Sequence[str]) -> Question:
    """A selection from the words of the command line: candidates, and `key=value`.

    Raises:
        UserError: every fault of the words, at once.
    """
    definition = load_study(study)
    candidates = []
    overrides = []
    values: dict[str, Any] = {}
    for word in words:
        first, *changes = shlex.split(word) or [""]
        key, sign, value = first.partition("=")
        if not sign:
            candidate = Candidate(first, tuple(changes))
            candidates.append(candidate)
        elif key in Halving.__dataclass_fields__:
            values[key] = yaml.safe_load(value)
        else:
            overrides.append(first)
    faults: list[str] = []
    halving = read(Halving, values, "", faults)
    if halving is not None:
        faults += halving.faults
    faults += _candidate_faults(definition, candidates)
    UserError.collect(faults)
    assert halving is not None
    return Question(definition, tuple(candidates), halving, tuple(overrides))


def _candidate_faults(study: Study, candidates: Sequence[Candidate]) -> Iterator[str]:
    """List what is wrong with the names of candidates."""
    files = (CONF / "growth").glob("*.yaml")
    leaves = [path.stem for path in files]
    known = {*study.arms, *leaves} - {SOURCE}
    labels = []
    for candidate in candidates:
        if candidate.name not in known:
            hint = did_you_mean(candidate.name, known)
            yield f"unknown candidate {candidate.name!r}; {hint}"
        if candidate.label in labels:
            yield f"candidate {candidate.label}: named twice"
        labels.append(candidate.label)
    if len(candidates) < 2:
        yield f"candidates: {len(candidates)}; give two or more, arms of the study or leaves of conf/growth"


# ---- its runs ----------------------------------------------------------------------------------------------


def jobs_of(asked: Question, candidate: Candidate, budgets: Sequence[int]) -> list[Job]:
    """The runs of a candidate up to the last of `budgets`, one for each seed.

    Raises:
        UserError: they compose to no run, or the lag lies within the warm-up.
    """
    study = asked.study
    name = candidate.name
    arm = study.arms.get(name, Arm())
    growth = [f"growth={arm.growth or name}", f"growth.name={candidate.label}"]
    own = [*arm.overrides, *candidate.overrides]
    lag = asked.halving.lag_tokens
    label = f"${{study}}-select-{candidate.label}-lag{lag}"
    runs = []
    try:
        base = _base(asked)
        schedule = _constant(asked, base, budgets)
        start = start_of(study)
        shared = [*study.runs, *start, *growth, *own, *schedule, *asked.overrides, "changes=''"]
        for seed in asked.halving.seeds:
            point = [f"seed={seed}", f"name='{label}-s{seed}'"]
            job = job_of(name, [*shared, *point])
            runs.append(job)
    except UserError as fault:
        raise UserError(f"candidate {candidate.label}: {fault}") from None
    return runs


def _base(asked: Question) -> Settings:
    """The study's own run, which says what all candidates share."""
    from outgrow.train.settings import compose

    study = asked.study
    start = start_of(study)
    return compose([*study.runs, *start, "growth=scratch", *asked.overrides])


def _constant(asked: Question, base: Settings, budgets: Sequence[int]) -> list[str]:
    """One constant rate for all, after a warm-up that the lag lies beyond."""
    lag = asked.halving.lag_tokens
    schedule = base.schedule
    warmup = schedule.warmup_tokens
    if warmup is None:
        warmup = round(schedule.warmup_fraction * lag)
    if warmup >= lag:
        raise UserError(
            f"lag_tokens: {lag} is within the warm-up of {warmup} tokens, where losses say nothing; raise "
            "it, or lower schedule.warmup_tokens"
        )
    rate = base.optimizer.learning_rate
    horizons = ",".join(map(str, budgets))
    return [
        "schedule=wsd",
        "schedule.decay_fraction=0.0",
        f"schedule.warmup_tokens={warmup}",
        f"schedule.horizons=[{horizons}]",
        f"optimizer.learning_rate={rate!r}",
    ]


# ---- who goes on -------------------------------------------------------------------------------------------


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


# ---- the selection -----------------------------------------------------------------------------------------


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
        first_rung = self.rungs[0]
        starts = {standing.label: fmean(standing.start) for standing in first_rung.standings}
        columns = {"right after growth": starts}
        for rung in self.rungs:
            losses = {standing.label: standing.loss for standing in rung.standings}
            columns[f"{rung.tokens:,} tokens"] = losses
        rows = []
        for before, after in itertools.pairwise(columns):
            both = list(columns[after])
            earlier = [columns[before][label] for label in both]
            later = [columns[after][label] for label in both]
            rho = rank_correlation(earlier, later)
            row = {"from": before, "to": after, "candidates": len(both), "spearman": rho}
            rows.append(row)
        return rows

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
            total += sum(own.values()) - sum(counted.values())
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


def select(asked: Question, jobs_at_once: int | None = None) -> Selection:
    """Train every rung that is not complete, and choose.

    Raises:
        UserError: the study, a candidate or a run folder is at fault, or every candidate diverged.
        RunFailed: a run ended with another error; the same command goes on from there.
    """
    from outgrow.experiments import study
    from outgrow.experiments.progress import Display

    at_once = study.processes(jobs_at_once)
    display = Display()
    logs = Path("runs") / f"logs-select-{asked.study.name}"
    sources = study.ready_sources(asked.study, at_once, logs, display)
    left = list(asked.candidates)
    course = asked.halving.rungs(len(left))
    all_budgets = [tokens for tokens, _ in course]
    for candidate in left:  # faults are told before the first one trains
        jobs_of(asked, candidate, all_budgets)
    rungs: list[Rung] = []
    for tokens, kept in course:
        # Train every candidate that is left up to this rung's tokens.
        budgets = all_budgets[: len(rungs) + 1]
        todo = {candidate.label: jobs_of(asked, candidate, budgets) for candidate in left}
        every = list(itertools.chain.from_iterable(todo.values()))
        missing = [job for job in every if not study.complete(job, *sources)]
        counts = f"{len(left)} candidates, {len(missing)} of {len(every)} runs to do"
        display.say(f"{tokens:,} tokens: {counts}")
        errors: Mapping[str, BaseException] = {}
        if missing:
            study.prepare_text(missing, display)
            try:
                study.run_jobs(missing, at_once, logs, display)
            except study.RunFailed as fault:
                others = [error for error in fault.errors.values() if not isinstance(error, Diverged)]
                if others:
                    raise
                errors = fault.errors
        # Rank them; the better share goes on.
        rung = _rung(tokens, kept, todo, errors)
        rungs.append(rung)
        for dropped in rung.diverged:
            display.say(f"{dropped.label} diverged and is out: {dropped.reason}")
        best = rung.standings[:kept]
        going = {standing.label for standing in best}
        left = [candidate for candidate in left if candidate.label in going]
        if len(left) == 1:
            break
    return Selection(asked.study.name, tuple(rungs))


def _rung(
    tokens: int, kept: int, todo: Mapping[str, Sequence[Job]], errors: Mapping[str, BaseException]
) -> Rung:
    """Read where every candidate stands, and who diverged.

    Args:
        todo: the runs of each candidate, by its label.
        errors: of runs that diverged, by name.

    Raises:
        UserError: all diverged, or a run folder is at fault.
    """
    standings = []
    dropped = []
    for label, jobs in todo.items():
        failed = [job.name for job in jobs if job.name in errors]
        reasons = [str(errors[name]) for name in failed]
        reasons += filter(None, map(_without_loss, jobs))
        if reasons:
            flops = sum(map(_spent, jobs))
            learned = sum(map(_learned_flops, jobs))
            candidate = Dropped(label, reasons[0], flops, learned)
            dropped.append(candidate)
        else:
            standing = Standing.of(label, _runs(jobs))
            standings.append(standing)
    if not standings:
        lines = [f"  - {candidate.label}: {candidate.reason}" for candidate in dropped]
        listing = "\n".join(lines)
        raise UserError(
            f"every candidate diverged; lower optimizer.learning_rate or raise lag_tokens\n{listing}"
        )
    best_first = tuple(ranked(standings))
    return Rung(tokens, best_first, kept, tuple(dropped))


def _without_loss(job: Job) -> str | None:
    """Say why a complete run has no loss to compare: a validation that was not finite."""
    if not folders.is_complete(job.folder):
        return None
    run = read_run(job.folder)
    return run.reason if isinstance(run, LeftOut) else None


def _spent(job: Job) -> float:
    """FLOPs of a job's training as far as it came, by its last row in metrics.jsonl; 0 where it has none."""
    last = 0.0
    for folder in job.folders:
        metrics = folder / folders.METRICS
        if not metrics.is_file():
            continue
        text = metrics.read_text(encoding="utf-8")
        rows = map(json.loads, text.splitlines())
        paid = [row.get("flops") or 0.0 for row in rows]
        last = max([last, *paid])
    return last


def _learned_flops(job: Job) -> float:
    """FLOPs of what was learned before a job's training."""
    for folder in job.folders:
        record = folders.read_run(folder)
        if record is not None:
            return record.start.operator_flops
    return 0.0


def _runs(jobs: Sequence[Job]) -> list[Run]:
    """The runs of complete jobs, each at its longest horizon."""
    runs = []
    for job in jobs:
        run = read_run(job.folder)
        if not isinstance(run, Run):
            raise UserError(f"{job.folder}: {run.reason}; delete it to run it again, or leave {job.arm} out")
        runs.append(run)
    return runs
