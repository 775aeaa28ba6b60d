"""Horizons: one stable trunk at a constant learning rate, and a decayed end at each of several budgets (arXiv
2405.18392).

outgrow train experiment=tiny growth=scratch schedule.warmup_tokens=40960
'schedule.horizons=[512000,1024000,2048000]'

Every horizon is a whole WSD run with a folder of its own, `<out>-t<tokens>`, and is to the bit the run that
its budget alone would have given. It only begins later: with a warm-up in tokens, two budgets have the same
rates until the shorter one's decay, so the longer run takes over the state that the shorter one kept when its
decay began (`stable/`), and trains from there.

    <out>-t512000/stable/step-00000094      the state before the first decay
    <out>-t1024000/run.json  "trunk": {...} whose state this run took over, and what it had cost by then

Tokens, FLOPs and seconds of a horizon count from the very beginning: its cost is the trunk up to it and its
own decay.

Where the course of a run depends on its budget, as with a growth at a share of it, there is no trunk to
share: each horizon is trained from its own start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import whole_folder, write_text
from outgrow.train.run import folder as run_folder
from outgrow.train.run import state
from outgrow.train.run.record import RunRecord, Trunk
from outgrow.train.schedule import stable_steps
from outgrow.train.settings import Settings, identity

STABLE = "stable"  # folder of the state that a run kept when its decay began
OWN = ("name", "train.budget_tokens")  # settings in which the runs of several horizons differ


# ---- keeping the trunk -------------------------------------------------------------------------------------


def keep_stable(folder: Path, settings: Settings, step: int) -> None:
    """Keep the checkpoint of `step` beside the others if it is the one that longer horizons go on from.

    They are dropped, it is not.
    """
    if step != branch_step(settings) or stable_checkpoint(folder) is not None:
        return
    checkpoint = state.folder_of(folder / run_folder.CHECKPOINTS, step)
    with whole_folder(state.folder_of(folder / STABLE, step)) as partial:
        _copy(checkpoint, partial)


def branch_step(settings: Settings) -> int | None:
    """The step after which the decay of a horizon's run begins; None where no other run goes on from it: it
    has no horizons, or its course depends on its budget.
    """
    if not settings.schedule.horizons or depends_on_budget(settings):
        return None
    return stable_steps(settings.schedule, settings.budget.steps)


def depends_on_budget(settings: Settings) -> bool:
    """Whether runs that differ in their budget alone differ before their decay: in when they grow, in how
    long a teacher teaches, in a warm-up of their own, or in a phase of the mixture.
    """
    grows = [stage for stage in settings.growth.stages[:-1] if stage.until_tokens is None]
    phases = () if settings.mixture is None else settings.mixture.phases
    of_a_share = [phase for phase in phases if phase.share is not None]
    taught = settings.transfer.teacher is not None
    return bool(grows or of_a_share) or taught or settings.schedule.rewarm == "new"


def stable_checkpoint(folder: Path) -> Path | None:
    """The kept state in a run's folder."""
    checkpoints = state.complete(folder / STABLE)
    return checkpoints[-1] if checkpoints else None


# ---- taking it over ----------------------------------------------------------------------------------------


def find_trunk(trunks: Sequence[Path], settings: Settings, say: Callable[[str], None]) -> Trunk | None:
    """The longest intact trunk among `trunks` that a new run can go on from; None where there is none.

    A damaged one is told and passed over: the run only begins earlier, and is the same to the bit.

    Raises:
        UserError: a trunk is another run than this one, apart from its budget.
    """
    last = branch_step(settings) or 0
    usable: list[tuple[state.Position, Path]] = []
    for folder in trunks:
        record = run_folder.read_run(folder)
        checkpoint = stable_checkpoint(folder)
        if record is None or checkpoint is None:
            continue
        _check_trunk(folder, record, settings)
        try:
            state.check(checkpoint, run=record.settings_hash)
            position = state.peek(checkpoint)
        except UserError as damage:
            say(f"{damage}: no trunk to go on from")
            continue
        if position.step <= last:
            usable.append((position, folder))
    if not usable:
        return None
    position, folder = max(usable, key=lambda pair: pair[0].step)
    return Trunk(str(folder), position.step, position.tokens, position.flops, position.seconds)


def _check_trunk(folder: Path, record: RunRecord, settings: Settings) -> None:
    theirs = identity(record.settings)
    ours = identity(settings)
    differing = run_folder.differing_settings(theirs, ours)
    lines = []
    for key, (there, asked) in differing.items():
        if key not in OWN:
            lines.append(f"\n  - {key}: the trunk has {there!r}, asked is {asked!r}")
    if lines:
        raise UserError(
            f"{folder}: another trunk than the one of {settings.name}; choose another name= or "
            f"out=:{''.join(lines)}",
        )


def trunk_record(trunk: Trunk) -> RunRecord:
    """The record of the run that a trunk belongs to."""
    record = run_folder.read_run(Path(trunk.folder))
    assert record is not None
    return record


def take_over_trunk(folder: Path, record: Trunk, run: str) -> None:
    """Put a new run where its trunk was when its decay began: metrics, samples, starts, and last the
    checkpoint.

    A kill in between leaves no checkpoint, so that the next start does all of it again.

    Args:
        run: the hash of the new run's settings.

    Raises:
        UserError: the trunk has gone or is damaged since the run began.
    """
    trunk = Path(record.folder)
    checkpoints = folder / run_folder.CHECKPOINTS
    checkpoint = state.folder_of(trunk / STABLE, record.step)
    if not (checkpoint / state.STATE).is_file():
        raise UserError(
            f"{folder}: it goes on from {checkpoint}, which is gone; delete the folder to train it from its "
            "beginning",
        )
    try:
        state.check(checkpoint)
    except UserError as damage:
        raise UserError(
            f"{folder}: it goes on from a state that is damaged ({damage}); delete the folder to train it "
            "from its beginning"
        ) from None
    metrics = (checkpoint / run_folder.METRICS).read_text()
    write_text(folder / run_folder.METRICS, metrics)
    if (trunk / run_folder.SAMPLES).is_file():
        (folder / run_folder.SAMPLES).unlink(missing_ok=True)
        _link(trunk / run_folder.SAMPLES, folder / run_folder.SAMPLES)
    for name in (run_folder.START, "stages"):
        if (trunk / name).is_dir() and not (folder / name).exists():
            with whole_folder(folder / name) as partial:
                _copy(trunk / name, partial)
    with whole_folder(state.folder_of(checkpoints, record.step)) as partial:
        _copy(checkpoint, partial)
        state.adopt(partial, run)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder's files, as hard links where the file system has them: nothing of ours changes a file in
    place.
    """
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        _link(path, copy)


def _link(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)
