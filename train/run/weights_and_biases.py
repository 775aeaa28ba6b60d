"""The record that Weights & Biases keeps of a run: its names, where it goes, and how it ends."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import in_one_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from outgrow.train.run.record import RunRecord
    from outgrow.train.settings import Settings

CLOCKS = ("step", "tokens", "flops", "seconds")
KINDS = ("train", "eval", "before_growth", "growth", "diagnostics", "benchmark", "skip")  # of rows
# that the server is waited for; what it has not taken by then stays on the disk for `wandb sync`
START_S, FINISH_S = 60, 120
LONGEST_NAME, LONGEST_LABEL = 128, 64  # characters that the server takes
Say = Callable[[str], None]


def start(folder: Path, settings: Settings, run: RunRecord, say: Say) -> GeneralTracker:
    """Curves grouped by study, over tokens by default, and losses over FLOPs and seconds as well.

    A server that cannot be reached leaves the run offline; one that is lost later is waited for at the end,
    and not for ever.
    """
    import wandb

    mode = _mode(settings.logger.mode)
    try:
        tracker = _begin(mode, folder, settings, run)
    except Exception as error:
        if mode != "online":
            raise
        say(f"W&B cannot be reached ({in_one_line(error)}); it is written offline, for `wandb sync`")
        wandb.teardown()  # its service would hold the run's name to be in use
        tracker = _begin("offline", folder, settings, run)
    say_where(tracker.run, say)
    for clock in CLOCKS:
        tracker.run.define_metric(clock, hidden=True)
    for kind in KINDS:
        tracker.run.define_metric(f"{kind}/*", step_metric="tokens")
        for axis in ("flops", "seconds"):
            tracker.run.define_metric(f"{kind}_by_{axis}/*", step_metric=axis)
    tracker.run.define_metric("eval/val_loss", step_metric="tokens", summary="min,last")  # the best one too
    return tracker


def say_where(run: Any, say: Say) -> None:
    """Say where the record is, how to look at it and how to upload it."""
    if run.disabled:
        say("W&B is switched off (WANDB_MODE=disabled)")
    elif run.offline:
        folder = os.path.relpath(Path(run.dir).parent)
        say(f"W&B, offline: {folder}; look at it: wandb leet run {folder}; upload it: wandb sync {folder}")
    else:
        say(f"W&B: {run.url}")


def end(run: Any, status: int) -> None:
    """End the record as its process ends, which shows it as finished (0), as preempted where the same command
    goes on, else as failed.
    """
    if status == os.EX_TEMPFAIL:
        run.mark_preempting()
    run.finish(exit_code=status)


def project(title: str) -> str:
    """The project's name: WANDB_PROJECT, else the one asked for, in the characters that W&B takes."""
    name = os.environ.get("WANDB_PROJECT") or title
    return re.sub(r"[/\\#?%:]", "_", name)[:LONGEST_NAME]


def _begin(mode: str, folder: Path, settings: Settings, run: RunRecord) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    arm = " ".join((run.arm, *run.changes))  # all its seeds, rates and horizons under one label
    tracker: Any = WandBTracker(
        project(settings.logger.project),
        entity=os.environ.get("WANDB_ENTITY"),
        name=settings.name[:LONGEST_NAME],
        id=f"{_clean(settings.name)[:50]}-{run.settings_hash[:8]}",
        resume="allow",
        group=settings.study[:LONGEST_NAME],
        job_type=arm[:LONGEST_LABEL],
        tags=[run.arm[:LONGEST_LABEL], f"seed {settings.seed}"],
        config=run.to_json(),
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(console="off", silent=True, init_timeout=START_S, finish_timeout=FINISH_S),
    )
    tracker.start()
    return tracker


def _clean(name: str) -> str:
    """A name in the characters that W&B takes in the id of a run and in the name of a table."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _mode(mode: str) -> str:
    if mode != "auto":
        return mode
    import wandb

    return os.environ.get("WANDB_MODE") or (
        "online" if wandb.login(prompt=False, verify=False) else "offline"
    )
