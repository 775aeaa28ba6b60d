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
        label = "-".join([self.name, *changes]).replace("=", "_")
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
            tokens = self.lag_tokens / self.keep ** len(rungs)
            kept = math.ceil(candidates * self.keep)
            candidates = max(1, min(candidates - 1, kept))  # one is left out at least
            rungs.append((round(tokens), candidates))
        return rungs

    @property
    def faults(self) -> Iterator[str]:
        if self.lag_tokens <= 0:
            yield f"lag_tokens: must be positive; found {self.lag_tokens}"
        if not 0 < self.keep < 1:
            yield f"keep: a share between 0 and 1; found {self.keep}"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
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
    definition, faults = load_study(study), list[str]()
    candidates, overrides, values = [], [], dict[str, Any]()
    for word in words:
        first, *changes = shlex.split(word) or [""]
        key, sign, value = first.partition("=")
        if not sign:
            candidates.append(Candidate(first, tuple(changes)))
        elif key in Halving.__dataclass_fields__:
            values[key] = yaml.safe_load(value)
        else:
            overrides.append(first)
    halving = read(Halving, values, "", faults)
    faults += [] if halving is None else list(halving.faults)
    faults += _candidate_faults(definition, candidates)
    UserError.collect(faults)
    assert halving is not None
    return Question(definition, tuple(candidates), halving, tuple(overrides))


def _candidate_faults(study: Study, candidates: Sequence[Candidate]) -> Iterator[str]:
    """List what is wrong with the names of candidates."""
    leaves = [path.stem for path in (CONF / "growth").glob("*.yaml")]
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
    study, name = asked.study, candidate.name
    arm = study.arms.get(name, Arm())
    growth = [f"growth={arm.growth or name}", f"growth.name={candidate.label}"]
    own = [*arm.overrides, *candidate.overrides]
    label = f"${{study}}-select-{candidate.label}-lag{asked.halving.lag_tokens}"
    runs = []
    try:
        alike = [*_constant(asked, _base(asked), budgets), *asked.overrides, "changes=''"]
        shared = [*study.runs, *start_of(study), *growth, *own, *alike]
        for seed in asked.halving.seeds:
            point = [f"seed={seed}", f"name='{label}-s{seed}'"]
            runs.append(job_of(name, [*shared, *point]))
    except UserError as fault:
        raise UserError(f"candidate {candidate.label}: {fault}") from None
    return runs


def _base(asked: Question) -> Settings:
    """The study's own run, which says what all candidates share."""
    from outgrow.train.settings import compose

    return compose([*asked.study.runs, *start_of(asked.study), "growth=scratch", *asked.overrides])


def _constant(asked: Question, base: Settings, budgets: Sequence[int]) -> list[str]:
    """One constant rate for all, after a warm-up that the lag lies beyond."""
    lag, schedule = asked.halving.lag_tokens, base.schedule
    warmup = schedule.warmup_tokens
    if warmup is None:
        warmup = round(schedule.warmup_fraction * lag)
    if warmup >= lag:
        raise UserError(
            f"lag_tokens: {lag} is within the warm-up of {warmup} tokens, where losses say nothing; raise "
            "it, or lower schedule.warmup_tokens"
        )
    rate = base.optimizer.learning_rate
    course = ["schedule=wsd", "schedule.decay_fraction=0.0", f"schedule.warmup_tokens={warmup}"]
    horizons = ",".join(map(str, budgets))
    return [*course, f"schedule.horizons=[{horizons}]", f"optimizer.learning_rate={rate!r}"]


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
        return sum(self.flops) + sum(self.operator_flops)

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
    left, order = sorted(standings, key=lambda one: (one.loss, one.cost)), list[Standing]()
    while left:
        alike = [one for one in left if ties(one, left[0])]
        chosen = min(alike, key=lambda one: (one.cost, one.loss))
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
    if len(one) < 3 or 1 in (len(set(one)), len(set(other))):
        return None
    from scipy.stats import spearmanr  # takes a second to import

    return float(spearmanr(one, other).statistic)


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
        return self.rungs[-1].standings[0]

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
        return {one.label: one for rung in self.rungs for one in rung.diverged}

    @property
    def correlations(self) -> list[dict[str, Any]]:
        """Rank correlation of each column of losses with the next, over the candidates that have both."""
        first = {one.label: fmean(one.start) for one in self.rungs[0].standings}
        columns = {"right after growth": first}
        for rung in self.rungs:
            losses = {one.label: one.loss for one in rung.standings}
            columns[f"{rung.tokens:,} tokens"] = losses
        rows = []
        for before, after in itertools.pairwise(columns):
            both = list(columns[after])
            earlier, later = ([columns[name][label] for label in both] for name in (before, after))
            rho = rank_correlation(earlier, later)
            rows.append({"from": before, "to": after, "candidates": len(both), "spearman": rho})
        return rows

    @property
    def ledger(self) -> dict[str, Any]:
        """FLOPs that choosing took: of all, and of those that lost, which the winner's own ledger has not."""
        costs, total = {}, 0.0
        for one in self.last:
            costs[one.label] = {"flops": sum(one.flops), "operator_flops": sum(one.operator_flops)}
            total += one.cost
        for label, dropped in self.diverged.items():  # further than where it last stood
            before = sum(costs.get(label, {}).values())
            own = {"flops": dropped.flops, "operator_flops": dropped.operator_flops}
            costs[label] = own
            total += sum(own.values()) - before
        losers = total - self.winner.cost
        return {"flops": total, "losers_flops": losers, "candidates": costs}

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rungs = [asdict(rung) for rung in self.rungs]
        own = {"study": self.study, "winner": self.winner.label, "rungs": rungs}
        return own | {"correlations": self.correlations, "ledger": self.ledger}


def select(asked: Question, jobs_at_once: int | None = None) -> Selection:
    """Train every rung that is not complete, and choose.

    Raises:
        UserError: the study, a candidate or a run folder is at fault, or every candidate diverged.
        RunFailed: a run ended with another error; the same command goes on from there.
    """
    from outgrow.experiments import study
    from outgrow.experiments.progress import Display

    at_once, display = study.processes(jobs_at_once), Display()
    logs = Path("runs") / f"logs-select-{asked.study.name}"
    sources = study.ready_sources(asked.study, at_once, logs, display)
    left, budgets = list(asked.candidates), list[int]()
    course = asked.halving.rungs(len(left))
    for candidate in left:  # faults are told before the first one trains
        jobs_of(asked, candidate, [tokens for tokens, _ in course])
    rungs = []
    for tokens, kept in course:
        budgets.append(tokens)
        todo = {candidate.label: jobs_of(asked, candidate, budgets) for candidate in left}
        every = [job for jobs in todo.values() for job in jobs]
        missing = [job for job in every if not study.complete(job, *sources)]
        display.say(f"{tokens:,} tokens: {len(left)} candidates, {len(missing)} of {len(every)} runs to do")
        errors: Mapping[str, BaseException] = {}
        if missing:
            study.prepare_text(missing, display)
            try:
                study.run_jobs(missing, at_once, logs, display)
            except study.RunFailed as fault:
                if not all(isinstance(error, Diverged) for error in fault.errors.values()):
                    raise
                errors = fault.errors
        rung = _rung(tokens, kept, todo, errors)
        rungs.append(rung)
        for dropped in rung.diverged:
            display.say(f"{dropped.label} diverged and is out: {dropped.reason}")
        going = {one.label for one in rung.standings[:kept]}
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
        reasons = [str(errors[job.name]) for job in jobs if job.name in errors]
        reasons += filter(None, map(_without_loss, jobs))
        if reasons:
            flops = sum(map(_spent, jobs))
            learned = sum(map(_learned_flops, jobs))
            dropped.append(Dropped(label, reasons[0], flops, learned))
        else:
            standings.append(Standing.of(label, _runs(jobs)))
    if not standings:
        listing = "\n".join(f"  - {one.label}: {one.reason}" for one in dropped)
        raise UserError(
            f"every candidate diverged; lower optimizer.learning_rate or raise lag_tokens\n{listing}"
        )
    return Rung(tokens, tuple(ranked(standings)), kept, tuple(dropped))


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
        rows = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        paid = [json.loads(row).get("flops") or 0.0 for row in rows]
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
