"""Folders that are whole, as a run's and a checkpoint's are: what is made of them lies beside them."""

from __future__ import annotations

import os
from pathlib import Path

from outgrow.model.base.errors import UserError, reading
from outgrow.train.data.shards import MANIFEST, TOKENIZER
from outgrow.train.run.folder import RUN

# what a folder is → what such a folder holds
WHOLE = {
    "a run's folder": (RUN,),
    "a checkpoint": ("config.json", "*.safetensors"),
    "a prepared text": (MANIFEST, TOKENIZER),
}


def check_beside(folder: Path, flag: str) -> None:
    """Refuse a folder for results that is whole without them, or lies in one that is.

    Args:
        flag: how the user names a folder.

    Raises:
        UserError: naming it, and what it is.
    """
    with reading(folder):
        path = Path(os.path.realpath(folder))
        kinds = {around: _kind(around) for around in (path, *path.parents)}
    for around, kind in kinds.items():
        if kind is not None:
            relation = "is" if around == path else f"lies in {around},"
            raise UserError(
                f"{folder}: {relation} {kind}, and nothing is written among its files; name a folder beside "
                f"it ({flag})"
            )


def _kind(folder: Path) -> str | None:
    for kind, marks in WHOLE.items():
        held = [any(folder.glob(mark)) for mark in marks]
        if all(held):
            return kind
    return None
