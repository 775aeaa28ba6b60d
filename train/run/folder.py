"""The run folder: identify the run in it, tell whether it is complete, and lock it for one group of
processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from outgrow.model.base.atomic import FORMER, PARTIAL
from outgrow.model.base.errors import UserError, reading
from outgrow.model.base.files import read_object, telling_disk_faults
from outgrow.model.base.locks import Lock
from outgrow.train.run.record import RunRecord, SourceCost, Summary
from outgrow.train.settings import Settings, identity, settings_hash
from outgrow.train.start.neutral import flatten, is_text

RUN, METRICS, SUMMARY, START, CHECKPOINTS, FINAL = (
    "run.json",
    "metrics.jsonl",
    "summary.json",
    "start",
    "checkpoints",
    "final",
)
FINAL_EMA = "final_ema"  # of the averaged weights
SAMPLES = "samples.json"
PICTURE = f"{START}/plan.png"


def read_run(folder: Path) -> RunRecord | None:
    """The record of the run in `folder`; None where no run has begun.

    Raises:
        UserError: it cannot be read, or holds files and none of them is a run's.
    """
    with reading(folder):
        has_record = (folder / RUN).is_file()
        is_folder = folder.is_dir()
        names = [path.name for path in folder.iterdir()] if is_folder else []
    if has_record:
        return RunRecord.read(folder / RUN, "not a run's record; choose another out=, or delete the folder")
    if folder.exists() and not is_folder:
        raise UserError(f"out: {folder} is a file; choose another out=")
    suffixes = ("", PARTIAL, FORMER)
    ours = {name + suffix for name, suffix in product((START, RUN), suffixes)}
    others = sorted(name for name in names if name not in ours)
    if others:
        raise UserError(
            f"out: {folder} holds {', '.join(others[:3])} and no {RUN}, so it is no run's folder; choose "
            "another out=",
        )
    return None


def is_complete(folder: Path) -> bool:
    """Check whether the run in `folder` has ended: its summary is written last."""
    return (folder / SUMMARY).is_file()


def check_end(folder: Path) -> None:
    """Check that the summary of a run that has one tells the end of this run.

    Raises:
        UserError: it is damaged or edited, or the rows beside it are not those at whose end it was written.
    """
    path = folder / SUMMARY
    metrics = folder / METRICS
    way_out = f"delete {SUMMARY}, and the same command goes on from the newest checkpoint"
    summary = Summary.read(path, way_out)
    rows = metrics.read_bytes() if metrics.is_file() else b""
    if summary.metrics not in (None, sha256(rows).hexdigest()):  # older summaries do not tell
        raise UserError(f"{path}: it tells the end of other rows than {METRICS} holds; {way_out}")


def reopen(folder: Path) -> None:
    """Let the run in `folder` be incomplete again: a complete one may train its end once more.

    Raises:
        UserError: what lies in the place of its summary cannot be removed.
    """
    path = folder / SUMMARY
    with telling_disk_faults(path):
        path.unlink(missing_ok=True)


def end_gone(folder: Path) -> str:
    """Say that a complete run's `final/` has been moved or deleted, and how to have it again; "" where it is
    there.
    """
    if (folder / FINAL).is_dir():
        return ""
    return (
        f"; its {FINAL}/ is gone: to have it again, delete {SUMMARY}, and the same command trains its end "
        "once more from the newest checkpoint"
    )


def unkept(folder: Path, run: RunRecord, settings: Settings) -> str | None:
    """Name what a complete run was not asked to keep and now is; None where it has all.

    Raises:
        UserError: its weights are wanted in the source's dtype, which its record does not tell.
    """
    if settings.train.keep_optimizer and not keeps_optimizer(folder):
        return "the optimizer's state (train.keep_optimizer)"
    if settings.train.save_dtype is None:
        return None
    dtype = final_dtype(folder, settings, run.start.source_dtype)
    return None if dtype == kept_dtype(folder) else f"its weights in {dtype} (train.save_dtype)"


def texts_elsewhere(run: RunRecord, settings: Settings) -> str:
    """Say where the text lies that a complete run has read, if that is not where it is asked for now."""
    now = flatten(json.loads(json.dumps(asdict(settings))))
    differing = differing_settings(flatten(run.settings), now)
    of_text = list(filter(is_text, differing))
    if not of_text:
        return ""
    lines = []
    for key in of_text:
        before, after = differing[key]
        lines.append(f"{key}={before}, not {after}")
    return f" (it read {'; '.join(lines)}: another text wants a name= of its own)"


def recast_to(folder: Path, run: RunRecord, settings: Settings) -> str | None:
    """The dtype that a complete run's float32 weights in `final/` are to be rounded to, if that is all there
    is to do; else None.
    """
    if settings.train.keep_optimizer and not keeps_optimizer(folder):
        return None
    dtype = final_dtype(folder, settings, run.start.source_dtype)
    return dtype if kept_dtype(folder) == "float32" != dtype else None


def keeps_optimizer(folder: Path) -> bool:
    """Check whether a run's `final/` holds the optimizer's state."""
    return (folder / FINAL / "optimizer.pt").is_file()


def final_dtype(folder: Path, settings: Settings, source: str | None) -> str:
    """The dtype of the weights in `final/`: the one asked for, else that of a `final/` that is there, else
    float32.

    Args:
        source: the dtype of the source's weights.

    Raises:
        UserError: the source's dtype is asked for and not known.
    """
    choice = settings.train.save_dtype
    if choice == "source" and source is None:
        raise UserError(
            "train.save_dtype=source: the dtype of the source's weights is not known; give float32, "
            "bfloat16 or float16",
        )
    return (source if choice == "source" else choice) or kept_dtype(folder) or "float32"


def kept_dtype(folder: Path) -> str | None:
    """The dtype of the weights in a run's `final/`; None where there is none."""
    config = folder / FINAL / "config.json"
    return (
        read_object(config, "not a model's config; delete final/").get("dtype") if config.is_file() else None
    )


def _further(folder: Path) -> str:
    return (
        f"to train what it reached further, and not the whole again: growth=source source={folder / FINAL} "
        "transfer=continued (after train.keep_optimizer=true, which makes a complete run keep its "
        "optimizer's state), under a study= of its own"
    )


def shorter_run(settings: Settings) -> str | None:
    """A line on the complete run that differs in nothing but a smaller budget.

    None where there is none beside the run's folder.
    """
    label = f"-budget_tokens{settings.train.budget_tokens}"
    out = Path(settings.out)
    folder = out.with_name(out.name.replace(label, ""))
    if label not in settings.name or not is_complete(folder):
        return None
    try:
        run = read_run(folder)
    except UserError:  # another run's damage is no fault of this one
        return None
    one = identity({} if run is None else run.settings)
    other = identity(settings)
    same = set(differing_settings(one, other)) <= {"name", "train.budget_tokens"}
    return (
        f"{folder} trained this for {one['train.budget_tokens']:,} tokens; {_further(folder)}"
        if same
        else None
    )


def check_same(folder: Path, run: RunRecord, settings: Settings) -> None:
    """Refuse a folder that holds another run.

    Raises:
        UserError: naming each setting that differs, with both values.
    """
    if run.settings_hash == settings_hash(settings):
        return
    differing = differing_settings(identity(run.settings), identity(settings), absent="nothing")
    lines = []
    for key, (there, asked) in differing.items():
        lines.append(f"\n  - {key}: the run has {there!r}, asked is {asked!r}")
    if differing.keys() <= {"train.budget_tokens", "name"} and is_complete(folder):
        lines.append(f"\n  {_further(folder)}")
    refusal = (
        f"{folder} holds a run under other settings; choose another name= or out=, or delete the folder:"
    )
    raise UserError(refusal + "".join(lines))


def differing_settings(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    absent: Any = None,
) -> dict[str, tuple[Any, Any]]:
    """The keys at which two flat settings differ, with both values; `absent` stands for a missing one."""
    differing = {}
    for key in {**one, **other}:
        pair = one.get(key, absent), other.get(key, absent)
        if pair[0] != pair[1]:
            differing[key] = pair
    return differing


def check_same_inputs(
    folder: Path,
    run: RunRecord,
    fingerprint: str,
    source: SourceCost | None,
    weights: Mapping[str, str],
) -> None:
    """Refuse to go on with a run whose text, source or teacher has changed since it began.

    Args:
        source: what it cost and reached.
        weights: of `start.weights_read`.

    Raises:
        UserError: naming what changed.
    """
    changed = ["data"] if run.data.fingerprint != fingerprint else []
    # a source that is gone by now is not needed any more
    if source is not None and run.start.source != source:
        changed.append("source")
    for name, digest in weights.items():
        if run.weights.get(name, digest) != digest:
            changed.append(f"weights of the {name}")
    advice = "changed since this run began; delete the folder to begin anew, or put it back"
    faults = []
    for name in changed:
        verb = "have" if name.startswith("weights") else "has"
        faults.append(f"{folder}: the {name} {verb} {advice}")
    UserError.collect(faults)


@contextmanager
def locked(folder: Path, holds: bool) -> Iterator[None]:
    """Lock `folder` for this group of processes in the block; `holds` is true on the one that takes the lock.

    The lock (`model.base.locks`) ends with the process. A folder that is still empty then is removed.

    Raises:
        UserError: another process trains in this folder, or it cannot be written.
    """
    if not holds:
        yield
        return
    with telling_disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.resolve())  # a link to another disk is one folder with what it names
    with lock:
        with telling_disk_faults(folder):
            is_ours = lock.take()
        if not is_ours:
            who = ": ".join(("", *filter(None, [lock.holder()])))
            raise UserError(f"{folder}: another process is training this run right now{who}")
        try:
            yield
        finally:
            with suppress(OSError):  # it holds something, unless the run was refused before it began
                folder.rmdir()
