"""Where a result goes whose folder nobody named: never over what was made of other runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from outgrow.experiments.study_file import studies
from outgrow.model.base.files import telling_disk_faults, write_json
from outgrow.model.base.locks import Lock
from outgrow.train.run.beside import check_beside

RECORD = "made_of.json"  # the inputs of a result that was made by hand


def by_hand(study: str) -> Path:
    """The folder for a comparison of runs of `study`: beside the study's own, where there is such a study."""
    suffix = "-by-hand" if study in studies() else ""
    return Path("runs") / f"comparison-{study}{suffix}"


@contextmanager
def placed(
    named: Path | None, default: Path, inputs: Sequence[str], flag: str = "--out DIR"
) -> Iterator[Path]:
    """Yield the folder for a result of `inputs`: the one that was named, or `default`, or, where that holds a
    result of other inputs, the first of `default-2`, `default-3`, … that does not. No other command writes
    there in the block.

    Args:
        flag: how the user names a folder.

    Raises:
        UserError: the folder cannot be made or read, or is a run's, a checkpoint's or a prepared text's.
    """
    if named is not None:
        check_beside(named, flag)
        with _held(named):
            yield named
            (named / RECORD).unlink(missing_ok=True)  # it is the user's: nothing goes there unasked
        return
    paths = sorted(str(Path(name).absolute()) for name in inputs)
    folder = default
    for number in count(2):
        with _held(folder):
            if _may_hold(folder, paths):
                if folder != default:
                    beside = f"this one goes to {folder} ({flag} names another)"
                    print(f"{default} holds a result of other runs; {beside}")
                yield folder
                write_json(folder / RECORD, paths)
                return
        folder = default.with_name(f"{default.name}-{number}")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other commands from writing there in the block; one that was made for it and is
    left empty is removed.
    """

    def tell(holder: str) -> None:
        print(f"{folder}: another command writes there; waiting for {holder}", file=sys.stderr)

    with telling_disk_faults(folder):
        was_there = folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.resolve())
    with lock:
        with telling_disk_faults(folder):
            lock.wait(tell)
        try:
            yield
        finally:
            if not was_there:
                with suppress(OSError):  # it holds something, unless nothing could be written
                    folder.rmdir()


def _may_hold(folder: Path, paths: Sequence[str]) -> bool:
    """Check whether a folder is free, or its result was made by hand of these inputs, or of some of them."""
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
        return set(json.loads(text)) <= set(paths)
    except (OSError, ValueError, TypeError):  # not made by hand
        return not any(folder.glob("[!.]*"))
