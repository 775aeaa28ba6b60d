"""Train one run, or sweep several.

outgrow train experiment=tiny_source                                           a tiny source from scratch, on
                                                                               one CPU
outgrow train experiment=tiny growth=lossless seed=0                           grow it and go on training
outgrow train -m experiment=tiny growth=scratch,lossless,tile,random_pad seed=0,1,2
torchrun --nproc_per_node 2 -m outgrow.train experiment=tiny growth=lossless seed=0
    (the same losses on two processes)
outgrow train -m hydra/launcher=slurm experiment=tiny growth=scratch,lossless  each point of the sweep as a
                                                                               Slurm job

Every run writes runs/<study>-<growth><changes>-s<seed>/ and resumes there when started again; <changes> is
what differs from the experiment's defaults and changes the result, such as -transfer_continued-lr0.01. A
sweep takes lists, choice(), range() and glob(), and goes on where one of its points fails.

Exit status: 0 done, 1 a point of a sweep failed, 2 a fault in what was asked, 75 (EX_TEMPFAIL) stopped by
SIGTERM or SIGUSR1 with everything saved (before the first step and while the result is written, too): start
the same command again, 130 the same by Ctrl-C.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from outgrow.model.base.compose import CONF
from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.base.interrupt import Terminated, started, terminable
from outgrow.model.base.overrides import own_folder, plain_text
from outgrow.train.compose import compose, settings_from
from outgrow.train.run.trackers import check_installed
from outgrow.train.settings import Settings
from outgrow.train.start.naming import tell_changes

if TYPE_CHECKING:
    from hydra.conf import HydraConf

FIRST_SECONDS = 5.0  # that the first process is given to tell an error
# in the libraries' errors of an exchange that another process has left
LEAVING = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited"),
    "Connection was likely closed",
)
LEFT_ALONE = (
    "another process has ended, and its own words tell why; the same command goes on from the newest "
    "checkpoint"
)
INTERRUPTED = 130  # as a shell ends what Ctrl-C stopped


FAILED: list[str] = []  # the points of this process' sweep that ended with an error, with the reason


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _hydra(cfg: DictConfig) -> None:
    """Run one job as Hydra composed it: of a sweep, or of a call with Hydra's own flags."""
    from outgrow.train.machine import slurm

    running = HydraConfig.get()
    if slurm.in_job():
        slurm.join()
    own = _own_folder(running)
    tell_changes(cfg, running.overrides.task, own)
    try:
        _train(settings_from(cfg, own=own))
    except (
        Exception
    ) as error:  # a rate that diverges is what sweeps are for: the other points have their turn
        alone = is_left_alone(error)
        expected = isinstance(error, UserError) or alone
        if running.mode != RunMode.MULTIRUN or slurm.in_job():
            if alone or not expected:
                raise
            _fail(str(error))
        if not expected:
            traceback.print_exc()
        words = LEFT_ALONE if alone else str(error)
        reason = words if expected else in_one_line(error, 500)
        FAILED.append(f"{cfg.name}: {reason}")
        _say(f"error: {FAILED[-1]}; the sweep goes on")


def main() -> None:
    """Train one run or a sweep.

    Both are composed here first, to report all faults; any other flag is Hydra's.
    """
    try:
        with terminable(signal.SIGUSR1, signal.SIGUSR2):
            _run(sys.argv[1:])
    except UserError as error:
        _fail(str(error))
    except RuntimeError as error:
        if not is_left_alone(error):
            raise
        time.sleep(2 * FIRST_SECONDS)  # who ended first tells why, and its launcher ends this process
        print(f"error: process {_rank()}: {LEFT_ALONE}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        _say("stopped; the same command goes on from what is complete")
        sys.exit(os.EX_TEMPFAIL if isinstance(stop, Terminated) else INTERRUPTED)


def _own_folder(running: HydraConf) -> Path | None:
    """The folder that --config-dir named, of a job as well that another process started."""
    own = [source.path for source in running.runtime.config_sources if source.provider == "command-line"]
    return Path(own[0]) if own else None


def _run(arguments: Sequence[str]) -> None:
    own, words = own_folder(arguments)
    words = list(map(plain_text, words))
    flags = [word for word in words if word.startswith("-")]
    overrides = [word for word in words if word not in flags]
    # Hydra's parser takes no flag between the overrides
    named = [] if own is None else ["--config-dir", str(own)]
    sys.argv[1:] = [*named, *flags_first(words)]
    if not flags:
        _train(compose(overrides, own))
    elif set(flags) <= {"-m", "--multirun"}:
        _sweep(overrides, own)
    else:
        _hydra()


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Hydra's flags, with their values, before the overrides."""
    overrides = [text for text in arguments if "=" in text and not text.startswith("-")]
    flags = [text for text in arguments if text not in overrides]
    return [*flags, *overrides]


def _sweep(overrides: list[str], own: Path | None) -> None:
    """Train every point, one after another or as jobs; exit with status 1 where one of them failed."""
    points = _check_sweep(overrides, own)
    if any(override.startswith("hydra/launcher=") for override in overrides):
        names = [f"  {point.name} → {point.out}" for point in points]
        heading = f"submitting {len(points)} jobs:"
        _say("\n".join((heading, *names)))
        _say(
            "their logs: runs/.submitit/JOB/, unless hydra.launcher.submitit_folder says otherwise; "
            "`squeue --me` lists the jobs",
        )
    # a local sweep writes one multirun.yaml, and the runs have no use for it
    with tempfile.TemporaryDirectory() as nowhere:
        if not any(override.startswith(("hydra.sweep.dir=", "hydra/launcher=")) for override in overrides):
            sys.argv.append(f"hydra.sweep.dir={nowhere}")
        _hydra()
    if FAILED:
        lines = [f"  - {line}" for line in FAILED]
        summary = f"{len(FAILED)} of {len(points)} points failed:"
        _fail("\n".join((summary, *lines)), status=1)


def _check_sweep(overrides: list[str], own: Path | None = None) -> list[Settings]:
    """Compose the points of a sweep, and report the faults of all of them before the first one trains.

    Raises:
        UserError: a point is at fault, two would train in one folder, or what starts the jobs is missing.
    """
    from outgrow.model.base.compose import sweep_points
    from outgrow.train.start.naming import same_folder

    _check_launcher(overrides)
    points = sweep_points(overrides, own)
    faults: list[str] = []
    settings: list[Settings] = []
    for point in points:
        try:
            settings.append(compose(point, own))
            check_installed(settings[-1].logger.trackers)
        except UserError as error:
            faults.append(str(error))
    if not faults:
        folders = [run.out for run in settings]
        faults = same_folder(list(zip(points, folders, strict=True)))
    UserError.collect(dict.fromkeys(faults))
    return settings


def _check_launcher(overrides: list[str]) -> None:
    """Refuse a launcher whose means are not here."""
    launchers = [
        override.partition("=")[2] for override in overrides if override.startswith("hydra/launcher=")
    ]
    if launchers and find_spec("submitit") is None:
        raise UserError(
            "hydra/launcher: submitit, which starts the jobs, is not installed; pip install -e '.[slurm]'",
        )
    for_slurm = any("slurm" in launcher for launcher in launchers)
    if for_slurm and shutil.which("srun") is None:
        raise UserError(
            f"hydra/launcher={launchers[-1]}: no srun on this machine, so it submits no Slurm jobs; start "
            "the sweep on a login node of the cluster, or leave hydra/launcher out "
            "(hydra/launcher=submitit_local: jobs on this machine)"
        )


def _train(settings: Settings) -> None:
    if settings.dry_run:
        _tell(settings)
        return
    check_installed(settings.logger.trackers)
    from outgrow.train.start.early import check_source

    check_source(settings)
    # torch, transformers and accelerate are loaded only for settings and sources that hold
    from outgrow.train.loop import train_horizons
    from outgrow.train.machine import slurm
    from outgrow.train.run.signals import Stopped, overruled

    try:
        train_horizons(settings)
    except Stopped as stopped:
        _say(f"{stopped}; the same command goes on from there{overruled(stopped.status)}")
        if slurm.in_job() and stopped.status != INTERRUPTED:
            slurm.requeue()
        else:
            sys.exit(stopped.status)


def _tell(settings: Settings) -> None:
    """Print what a run would take.

    Raises:
        UserError: what cannot be counted, and what is wrong with a learned growth, at once.
    """
    from outgrow.train.machine.forecast import tell
    from outgrow.train.start.lesson import lesson_faults

    faults = list(lesson_faults(settings))
    text = ""
    try:
        text = tell(settings)
    except UserError as fault:
        faults.append(str(fault))
    UserError.collect(dict.fromkeys(faults))
    print(text)


def _fail(error: str, status: int = 2) -> NoReturn:
    """Tell an error and end.

    The first of several processes tells one that all have, and its end ends the others; another tells what it
    meets alone.
    """
    rank = _rank()
    if rank:
        time.sleep(FIRST_SECONDS)
        error = f"process {rank}: {error}"
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)


def is_left_alone(error: Exception) -> bool:
    """Check for the error that this process meets because another has ended."""
    is_exchange = isinstance(error, RuntimeError)
    return is_exchange and any(sign in str(error) for sign in LEAVING)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    started()
    main()
