"""Run a study: the text once, the source, every arm in a pool of processes; whatever is complete is skipped.

outgrow study tiny
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.experiments.progress import Display
from outgrow.experiments.runs import SCRATCH
from outgrow.experiments.study_file import (
    Extent,
    Job,
    Study,
    check_arms,
    jobs,
    load_study,
    results_folder,
    source_jobs,
)
from outgrow.experiments.worker import initialise, work
from outgrow.model.base.errors import UserError
from outgrow.model.base.machine import cores
from outgrow.train.run.folder import check_same, is_complete, read_run, unkept
from outgrow.train.settings import horizon_runs

if TYPE_CHECKING:
    from outgrow.train.data import TokenData
    from outgrow.train.data.settings import DataSettings
    from outgrow.train.settings import Settings

Train = Callable[[Job, str], str]


GRACE_S = 15  # that runs have to save in, once the study is stopped


class RunFailed(Exception):
    """Runs of the study ended with errors; the message is each of them, and where its log is.

    Attributes:
        errors: by the run's name.
    """

    def __init__(self, message: str, errors: Mapping[str, BaseException]) -> None:
        super().__init__(message)
        self.errors = errors


@dataclass(frozen=True)
class Done:
    """The products of a study: run folders, the place of the comparison, and the README that shows it, if
    any.

    Attributes:
        horizons: its runs are decayed ends, to be held against scratch's curve.
        family: they are products of several sizes, counted together.
        costs: scratch is among the arms and all read the same, so that their costs can be compared.
        texts: the texts that the arms are judged on.
    """

    folders: tuple[Path, ...]
    out: Path
    readme: Path | None
    horizons: bool
    family: bool
    costs: bool
    texts: Mapping[str, TokenData]


def run_study(
    name: str, *, full: bool = False, jobs_at_once: int | None = None, own: Path | None = None
) -> Done:
    """Do every stage of a study that is not done yet.

    Args:
        own: a folder of the user's, whose leaves the study may name too.

    Raises:
        UserError: the study, its settings or a run folder is at fault.
        RunFailed: a run ended with an error; what was complete stays, and the same command goes on from
            there.
    """
    study = load_study(name, own)
    extent = study.full if full else study.demo
    out = results_folder(name, full)
    readme = page_of(out) if full else None
    logs = Path("runs") / f"logs-{name}"
    at_once = processes(jobs_at_once)
    display = Display()
    check_arms(study, extent)
    sources = ready_sources(study, at_once, logs, display, extent)
    todo = jobs(study, extent)
    check_control(study, todo)
    texts = judged_texts(study, sources, todo, display) if study.judged_on else {}
    missing = [job for job in todo if not complete(job, *sources)]
    completed = len(todo) - len(missing)
    display.say(f"{len(todo)} runs, {completed} of them complete")
    if missing:
        prepare_text(missing, display)
        run_jobs(missing, at_once, logs, display)
    folders: list[Path] = []
    for job in todo:
        folders += job.folders
    return Done(
        tuple(folders),
        out,
        readme,
        horizons=any(job.settings.schedule.horizons for job in todo),
        family=study.family,
        costs=not texts or comparable_costs(study, todo),
        texts=texts,
    )


def page_of(out: Path) -> Path | None:
    """The README that shows a study's table; None where there is none.

    Raises:
        UserError: it has no place for a table.
    """
    from outgrow.experiments.table import check_markers

    readme = out / "README.md"
    if not readme.is_file():
        return None
    check_markers(readme)
    return readme


def ready_sources(
    study: Study, at_once: int, logs: Path, display: Display, extent: Extent | None = None
) -> list[Job]:
    """The runs of the sources of an extent of a study, of all that it has by default, each trained if it is
    not complete; none where the study trains none.
    """
    sources = source_jobs(study, extent.arms, extent.seeds) if extent else source_jobs(study)
    for source in sources:  # one after another: one may have grown from the one before
        if not complete(source, *sources):
            prepare_text([source], display)
            run_jobs([source], at_once, logs, display)
    folders = [str(source.folder) for source in sources]
    origin = ", ".join(folders) or study.source or "none"
    display.say(f"source: {origin}")
    return sources


def check_control(study: Study, todo: Sequence[Job]) -> None:
    """Refuse a study of horizons whose arms grow without the small network beside them.

    Raises:
        UserError: nothing would tell a bigger network from one that was only trained longer.
    """
    from outgrow.model.geometry import parameter_count
    from outgrow.train.start.source import target_config

    grown = [job for job in todo if study.counts_as(job.arm) != SCRATCH]
    has_horizons = any(job.settings.schedule.horizons for job in todo)
    if not grown or not has_horizons:
        return
    sizes = set()
    for job in todo:
        source = Path(job.settings.source) if job.settings.source else None
        if source is not None and not source.is_dir():
            return  # a name on the hub, which nothing has fetched yet: the comparison tells
        config = target_config(job.settings, source)
        sizes.add(parameter_count(config))
    if len(sizes) == 1:
        raise UserError(
            f"{study.name}: no control among its arms; every one has the same number of parameters, so "
            "nothing would tell a bigger network from one that was only trained longer. Add the small "
            "network alone: an arm with growth: scratch and the small target"
        )


def comparable_costs(study: Study, todo: Sequence[Job]) -> bool:
    """Check whether scratch is among the arms and all read the same."""
    runs = [job.settings for job in todo]
    texts = {repr((run.data, run.mixture)) for run in runs}
    arms = {study.counts_as(job.arm) for job in todo}
    return len(texts) == 1 and SCRATCH in arms


def judged_texts(
    study: Study, sources: Sequence[Job], todo: Sequence[Job], display: Display
) -> dict[str, TokenData]:
    """The texts that the study's arms are judged on, built where they are missing.

    Raises:
        UserError: a source or an arm may be trained on one of them.
    """
    from outgrow.experiments.judgement import check_held_out, open_texts

    check_held_out(study.judged_on, [*todo, *sources])
    display.say(f"texts to judge on: {', '.join(study.judged_on)}")
    first = todo[0]
    return open_texts(study.judged_on, first, text_of(first))


def processes(count: int | None) -> int:
    """The number of runs that go at a time; None: one for each core."""
    at_once = cores() if count is None else count
    if at_once < 1:
        raise UserError(f"--jobs {at_once}: expected at least 1")
    return at_once


def complete(job: Job, *sources: Job) -> bool:
    """Check whether the job's run is complete, under these settings and from the one of `sources` that it
    names.

    Raises UserError where the folder holds another run, or one that was grown from a source that has been
    retrained since.
    """
    runs = zip(job.folders, horizon_runs(job.settings), strict=True)
    # each of them, to report what is at fault
    answers = [_complete(folder, run, sources) for folder, run in runs]
    return all(answers)


def _complete(folder: Path, settings: Settings, sources: Sequence[Job]) -> bool:
    record = read_run(folder)
    if record is None:
        return False
    check_same(folder, record, settings)
    own = record.start.source
    finals = [source.folder / "final" for source in sources]
    for final in finals:
        if own is None or settings.source != str(final):
            continue
        text = (final / "ledger.json").read_text(encoding="utf-8")
        ledger = json.loads(text)
        values = {key: ledger.get(key) for key in ("tokens", "flops", "val_loss")}
        if values != {key: getattr(own, key) for key in values}:
            raise UserError(
                f"{folder} started from a source that {final.parent} no longer holds; delete {folder} to "
                "run it again",
            )
    return is_complete(folder) and not unkept(folder, record, settings)


def text_of(job: Job) -> DataSettings:
    """The text that a job reads, cut by its source's tokenizer where that has one."""
    from outgrow.train.run.reading import reading

    source = Path(job.settings.source or "")
    is_folder = bool(job.settings.source) and source.is_dir()
    own_source = source if is_folder else None
    return reading(job.settings, own_source, read_run(job.folder))


def prepare_text(todo: Sequence[Job], display: Display) -> None:
    """Build corpus, tokenizer and shards once, those of a mixture's sources too, before several processes
    would each wait for them.
    """
    from outgrow.train.corpus import prepare
    from outgrow.train.data.mixture import mixed

    by_text: dict[tuple[Any, ...], Job] = {}
    for job in todo:
        run = job.settings
        key = (run.data.home, run.source, repr(run.mixture))
        by_text[key] = job
    for job in by_text.values():
        text = text_of(job)
        mixture = job.settings.mixture
        name = f", {mixture.name}" if mixture else ""
        display.say(f"text: {text.home}{name}")
        budget = job.settings.budget
        context = job.settings.train.context
        rows = budget.steps * budget.rows
        tokens = prepare(text)
        mixed(mixture, text, tokens, prepare, context=context, rows=rows)


def run_jobs(todo: Sequence[Job], at_once: int, logs: Path, display: Display, train: Train = work) -> None:
    """Run the jobs in fresh processes, `at_once` at a time; one that fails leaves the others their turn.

    Each process gets its share of the cores, a run that is alone too: with one run for each core that is one
    thread, whatever the machine, so that a result does not depend on how many cores there were; run.json
    records the number.

    Ctrl-C, or SIGTERM, reaches this process alone, which starts nothing new, asks the runs to save and end
    (SIGTERM), and waits GRACE_S for them.

    Raises:
        RunFailed: naming every run that failed, why, and its log.
    """
    threads = max(1, cores() // at_once)
    at_once = min(at_once, len(todo))
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(at_once, mp_context=context, initializer=initialise, initargs=(threads,))

    def submit(job: Job) -> Future[str]:
        log = str(log_of(job, logs))
        return pool.submit(train, job, log)

    with pool, display.watching(todo):
        try:
            failed = _follow(submit, todo, at_once, logs, display)
        except BaseException:
            # those of this pool: nothing else here starts any. Its thread ends with them, and is joined: left
            # alone, it may close its pipe just when the interpreter, ending, wakes it
            _end(multiprocessing.active_children())
            raise
    faults = [_words(job, error, logs) for job, error in failed]
    errors = {job.name: error for job, error in failed}
    if len(faults) == 1:
        raise RunFailed(faults[0], errors)
    if faults:
        count = f"{len(faults)} of {len(todo)} runs failed:"
        raise RunFailed("\n".join((count, *faults)), errors)


def _end(processes: Sequence[BaseProcess]) -> None:
    """Ask the processes to save and end.

    What has not within GRACE_S is killed (its newest checkpoint is whole).
    """
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE_S
    for process in processes:
        left = until - time.monotonic()
        process.join(max(0.0, left))
        if process.is_alive():
            process.kill()


def _words(job: Job, error: BaseException, logs: Path) -> str:
    """Say which run failed, why, and where its log is."""
    log = log_of(job, logs)
    return f"{job.name}: {error}\n(its log: {log})"


def log_of(job: Job, logs: Path) -> Path:
    """The file of a run's own output while the bars have the terminal."""
    return logs / f"{job.name}.log"


def _follow(
    start: Callable[[Job], Future[str]],
    todo: Sequence[Job],
    at_once: int,
    logs: Path,
    display: Display,
) -> list[tuple[Job, BaseException]]:
    """Start jobs as places get free and move the bars, until all are done; return what failed, and why.

    Raises:
        RunFailed: a process was ended from outside, and the pool with it.
    """
    waiting = list(todo)
    began = time.monotonic()
    running: dict[Future[str], Job] = {}
    failed: list[tuple[Job, BaseException]] = []
    while waiting or running:
        while waiting and len(running) < at_once:  # none waits in the pool, where it would begin after Ctrl-C
            job = waiting.pop(0)
            running[start(job)] = job
        ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        display.refresh()
        for future in ended:
            job = running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise RunFailed(_words(job, error, logs), {job.name: error}) from error
            if error is None:
                display.finished(job, time.monotonic() - began)
            else:
                display.say(f"failed: {job.name}; the others go on")
                failed.append((job, error))
    return failed
