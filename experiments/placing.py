"""Where a result goes whose folder nobody named: never over what was made of other runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from outgrow.experiments.study_file import studies
from outgrow.model.base.files import write_json

RECORD = "made_of.json"  # the inputs of a result that was made by hand


def by_hand(study: str) -> Path:
    """The folder for a comparison of runs of `study`: beside the study's own, where there is such a study."""
    suffix = "-by-hand" if study in studies() else ""
    return Path("runs") / f"comparison-{study}{suffix}"


@contextmanager
def placed(named: Path | None, default: Path, inputs: Sequence[str]) -> Iterator[Path]:
    """Yield the folder for a result of `inputs`: the one that was named, or `default`, or, where that holds a
    result of other inputs, the first of `default-2`, `default-3`, … that does not.
    """
    if named is not None:
        yield named
        (named / RECORD).unlink(missing_ok=True)  # it is the user's: nothing goes there unasked
        return
    paths = sorted(str(Path(name).absolute()) for name in inputs)
    folder = default
    for number in count(2):
        if _may_hold(folder, paths):
            break
        folder = default.with_name(f"{default.name}-{number}")
    if folder != default:
        print(f"{default} holds a result of other runs; this one goes to {folder} (--out DIR names another)")
    yield folder
    write_json(folder / RECORD, paths)


def _may_hold(folder: Path, paths: Sequence[str]) -> bool:
    """Check whether a folder is free, or its result was made by hand of these inputs, or of some of them."""
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
        return set(json.loads(text)) <= set(paths)
    except (OSError, ValueError, TypeError):  # not made by hand
        return not any(folder.glob("[!.]*"))
