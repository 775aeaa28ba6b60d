"""The run folder: which run it holds, whether that run is complete, and that only one process group works in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outgrow.model.base.atomic import FORMER, PARTIAL
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import read_object, telling_disk_faults
from outgrow.model.base.locks import Lock
from outgrow.train.settings import Settings, identity, settings_hash
from outgrow.train.start.naming import arm_changes

RUN, METRICS, SUMMARY, START, CHECKPOINTS, FINAL = "run.json", "metrics.jsonl", "summary.json", "start", "checkpoints", "final"
SAMPLES, PICTURE = "samples.json", f"{START}/plan.png"

NEEDED = ("settings", "settings_hash", "data", "start", "target_config", "precision")  # of a run's record, to go on with the run


def read_run(folder: Path) -> dict[str, Any] | None:
    """The run.json of a run folder; None where no run has begun.

    Raises:
        UserError: run.json cannot be read, or the folder holds files and none of them is a run's.
    """
    if (folder / RUN).is_file():
        way_out = "not a run's record; choose another out=, or delete the folder"
        run = read_object(folder / RUN, way_out)
        if missing := [key for key in NEEDED if not isinstance(run.get(key), (dict, str))]:
            raise UserError(f"{folder / RUN}: has no {', '.join(missing)}; {way_out}")
        return run
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: {folder} is a file; choose another out=")
    known = {name + suffix for name in (START, RUN) for suffix in ("", PARTIAL, FORMER)}
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.is_dir() else []
    if strangers:
        raise UserError(f"out: {folder} holds {', '.join(strangers[:3])} and no {RUN}, so it is no run's folder; choose another out=")
    return None


def is_complete(folder: Path) -> bool:
    """Whether the run in `folder` has ended (its summary is written last)."""
    return (folder / SUMMARY).is_file()


def unkept(folder: Path, run: Mapping[str, Any], settings: Settings) -> str | None:
    """What a complete run was not asked to keep and now is, in words; None where it has all.

    Raises:
        UserError: its weights are wanted in the source's dtype, which its record does not tell.
    """
    if settings.train.keep_optimizer and not keeps_optimizer(folder):
        return "Adam's state (train.keep_optimizer)"
    if settings.train.save_dtype is None:
        return None
    asked = final_dtype(folder, settings, run["start"].get("source_dtype"))
    return None if asked == kept_dtype(folder) else f"its weights in {asked} (train.save_dtype)"


def recast_to(folder: Path, run: Mapping[str, Any], settings: Settings) -> str | None:
    """The dtype that a complete run's float32 weights in `final/` are to be rounded to, if that is all there is to do; else None."""
    if settings.train.keep_optimizer and not keeps_optimizer(folder):
        return None
    asked = final_dtype(folder, settings, run["start"].get("source_dtype"))
    return asked if kept_dtype(folder) == "float32" != asked else None


def keeps_optimizer(folder: Path) -> bool:
    """Whether a run's `final/` holds Adam's state."""
    return (folder / FINAL / "optimizer.pt").is_file()


def final_dtype(folder: Path, settings: Settings, source: str | None) -> str:
    """The dtype that the weights in `final/` are to have: where none is asked for, that of a `final/` that is there.

    Args:
        source: the dtype of the source's weights.

    Raises:
        UserError: the source's dtype is asked for and not known.
    """
    asked = settings.train.save_dtype
    if asked == "source" and source is None:
        raise UserError("train.save_dtype=source: the dtype of the source's weights is not known; give float32, bfloat16 or float16")
    return (source if asked == "source" else asked) or kept_dtype(folder) or "float32"


def kept_dtype(folder: Path) -> str | None:
    """The dtype of the weights in a run's `final/`; None where there is none."""
    config = folder / FINAL / "config.json"
    return read_object(config, "not a model's config; delete final/").get("dtype") if config.is_file() else None


def _further(folder: Path) -> str:
    return (
        f"to train what it reached further, and not the whole again: growth=source source={folder / FINAL} transfer=continued "
        "(after train.keep_optimizer=true, which makes a complete run keep Adam's state), under a study= of its own"
    )


def shorter_run(settings: Settings) -> str | None:
    """A line on the complete run that differs in nothing but a smaller budget; None where there is none beside the run's folder."""
    label = f"-budget_tokens{settings.train.budget_tokens}"
    folder = Path(settings.out).with_name(Path(settings.out).name.replace(label, ""))
    if label not in settings.name or not is_complete(folder):
        return None
    try:
        there = (read_run(folder) or {}).get("settings", {})
    except UserError:  # another run's damage is no fault of this one
        return None
    one, other = identity(there), identity(settings)
    same = {key for key in {**one, **other} if one.get(key) != other.get(key)} <= {"name", "train.budget_tokens"}
    return f"{folder} trained this for {one['train.budget_tokens']:,} tokens; {_further(folder)}" if same else None


def check_same(folder: Path, run: Mapping[str, Any], settings: Settings) -> None:
    """Refuse a folder that holds another run.

    Raises:
        UserError: naming each setting that differs, with both values.
    """
    if run.get("settings_hash") == settings_hash(settings):
        return
    there, asked = identity(run.get("settings", {})), identity(settings)
    absent = object()
    differing = [key for key in {**there, **asked} if there.get(key, absent) != asked.get(key, absent)]
    lines = "".join(f"\n  - {key}: the run has {there.get(key, 'nothing')!r}, asked is {asked.get(key, 'nothing')!r}" for key in differing)
    longer = set(differing) <= {"train.budget_tokens", "name"} and is_complete(folder)
    way = f"\n  {_further(folder)}" if longer else ""
    raise UserError(f"{folder} holds a run under other settings; choose another name= or out=, or delete the folder:{lines}{way}")


def check_same_inputs(
    folder: Path, run: Mapping[str, Any], fingerprint: str, source: Mapping[str, Any] | None, weights: Mapping[str, str]
) -> None:
    """Refuse to go on with a run whose text, source or teacher has changed since it began.

    Args:
        source: what it cost and reached.
        weights: of `start.weights_read`.

    Raises:
        UserError: naming what changed.
    """
    changed = ["data"] if run["data"]["fingerprint"] != fingerprint else []
    if source is not None and run["start"]["source"] != source:  # a source that is gone by now is not needed any more
        changed.append("source")
    begun_with = run.get("weights", {})
    changed += [f"weights of the {what}" for what, digest in weights.items() if begun_with.get(what, digest) != digest]
    UserError.collect(
        f"{folder}: the {what} has changed since this run began; delete the folder to begin anew, or put it back" for what in changed
    )


def new_run(settings: Settings, **more: Any) -> dict[str, Any]:
    """What run.json says: who the run is, every setting, and `more`."""
    who: dict[str, Any] = {"study": settings.study, "arm": settings.growth.name, "seed": settings.seed, "name": settings.name}
    who["changes"] = arm_changes(settings.changes)
    return who | {"settings": asdict(settings), "settings_hash": settings_hash(settings)} | more


@contextmanager
def locked(folder: Path, holds: bool) -> Iterator[None]:
    """Hold `folder` for this process group while the block runs; `holds` is true on the one process that takes the lock.

    The lock (`model.base.locks`) ends with the process.

    Raises:
        UserError: another process trains in this folder, or it cannot be written.
    """
    if not holds:
        yield
        return
    with telling_disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
    with lock:
        if not lock.take():
            raise UserError(f"{folder}: another process is training this run right now")
        yield
