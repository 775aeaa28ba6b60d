"""Choose an operator by its loss after a lag: successive halving over ways to start (LAG, 2406.02469).

outgrow select tiny_transfer lossless random_pad "lossless growth.depth=stack" lag_tokens=100000

Every candidate trains the lag on the same batches at the same constant rate; the better share goes on,
longer, until one is left. One that diverges with any seed is out. The loss right after growth says little of
the end, the loss after a lag more. A rung is a study's pool of runs, and a longer one takes over the trunk of
the shorter (`train.run.horizons`): what is complete is skipped, and nothing is trained twice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outgrow.experiments.halving import Candidate, Question
from outgrow.experiments.runs import LeftOut, Run, read_run
from outgrow.experiments.standings import Dropped, Rung, Selection, Standing, ranked
from outgrow.experiments.study_file import Arm, Job, job_of, start_of
from outgrow.model.base.errors import Diverged, UserError
from outgrow.train.run import folder as folders

if TYPE_CHECKING:
    from outgrow.experiments.progress import Display
    from outgrow.train.settings import Settings

Errors = Mapping[str, BaseException]  # of runs, by name


def jobs_of(question: Question, candidate: Candidate, budgets: Sequence[int]) -> list[Job]:
    """The runs of a candidate up to the last of `budgets`, one for each seed.

    Raises:
        UserError: they compose to no run, or the lag lies within the warm-up.
    """
    study = question.study
    name = candidate.name
    arm = study.arms.get(name, Arm())
    leaf = arm.growth or name
    growth = [f"growth={leaf}", f"growth.name={candidate.label}"]
    own = [*arm.overrides, *candidate.overrides]

    lag = question.halving.lag_tokens
    label = f"${{study}}-select-{candidate.label}-lag{lag}"
    runs = []
    try:
        base = _base(question)
        schedule = _constant(question, base, budgets)
        start = start_of(study)
        shared = [*study.runs, *start, *growth, *own, *schedule, *question.overrides, "changes=''"]
        for seed in question.halving.seeds:
            point = [f"seed={seed}", f"name='{label}-s{seed}'"]
            job = job_of(name, [*shared, *point], study.own)
            runs.append(job)
    except UserError as fault:
        raise UserError(f"candidate {candidate.label}: {fault}") from None
    return runs


def _base(question: Question) -> Settings:
    """The study's own run, which says what all candidates share."""
    from outgrow.train.compose import compose

    study = question.study
    start = start_of(study)
    return compose([*study.runs, *start, "growth=scratch", *question.overrides], study.own)


def _constant(question: Question, base: Settings, budgets: Sequence[int]) -> list[str]:
    """One constant rate for all, after a warm-up that the lag lies beyond."""
    lag = question.halving.lag_tokens
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


# ---- the selection -----------------------------------------------------------------------------------------


def select(question: Question, jobs_at_once: int | None = None) -> Selection:
    """Train every rung that is not complete, and choose.

    Raises:
        UserError: the study, a candidate or a run folder is at fault, or every candidate diverged.
        RunFailed: a run ended with another error; the same command goes on from there.
    """
    from outgrow.experiments import study
    from outgrow.experiments.progress import Display

    at_once = study.processes(jobs_at_once)
    display = Display()
    logs = Path("runs") / f"logs-select-{question.study.name}"
    left = list(question.candidates)
    course = question.halving.rungs(len(left))
    all_budgets = [tokens for tokens, _ in course]
    for candidate in left:  # faults are told before a source or the first candidate trains
        jobs_of(question, candidate, all_budgets)
    sources = study.ready_sources(question.study, at_once, logs, display)
    rungs: list[Rung] = []
    for tokens, keep_count in course:
        # Train every candidate that is left up to this rung's tokens.
        budgets = all_budgets[: len(rungs) + 1]
        todo = {candidate.label: jobs_of(question, candidate, budgets) for candidate in left}
        every = list(itertools.chain.from_iterable(todo.values()))
        missing = [job for job in every if not study.complete(job, *sources)]
        counts = f"{len(left)} candidates, {len(missing)} of {len(every)} runs to do"
        display.say(f"{tokens:,} tokens: {counts}")
        errors = _train(missing, at_once, logs, display)
        # Rank them; the better share goes on.
        rung = _rung(tokens, keep_count, todo, errors)
        rungs.append(rung)
        for dropped in rung.diverged:
            display.say(f"{dropped.label} diverged and is out: {dropped.reason}")
        best = rung.standings[:keep_count]
        going = {standing.label for standing in best}
        left = [candidate for candidate in left if candidate.label in going]
        if len(left) == 1:
            break
    return Selection(question.study.name, tuple(rungs))


def _train(jobs: Sequence[Job], at_once: int, logs: Path, display: Display) -> Errors:
    """Train jobs; the errors of those that diverged.

    Raises:
        RunFailed: a run ended with another error.
    """
    from outgrow.experiments import study

    if not jobs:
        return {}
    study.prepare_text(jobs, display)
    try:
        study.run_jobs(jobs, at_once, logs, display)
    except study.RunFailed as fault:
        for error in fault.errors.values():
            if not isinstance(error, Diverged):
                raise
        return fault.errors
    return {}


def _rung(tokens: int, keep_count: int, todo: Mapping[str, Sequence[Job]], errors: Errors) -> Rung:
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
    return Rung(tokens, best_first, keep_count, tuple(dropped))


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
