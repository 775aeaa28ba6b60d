"""Pieces of what a growth has learned, beside the unfinished folder: a killed growth goes on from them.

Each piece is one file of the folder `<out>.learning`, written whole, and all go when `out` is complete. One
is used only where everything that decides the result is the same, so that a growth that was killed ends with
the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from outgrow.growth.engine.rows import Reader
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import whole_file

ENDING = ".safetensors"


@dataclass(frozen=True)
class Kept:
    """The pieces of one growth.

    Attributes:
        key: a fingerprint of everything that decides the result.
    """

    folder: Path
    key: str

    def check(self) -> None:
        """Look whether the folder holds nothing but pieces, of this growth or another.

        Raises:
            UserError: something else is in the way.
        """
        if not self.folder.exists():
            return
        if not self.folder.is_dir() or any(map(_is_foreign, self.folder.iterdir())):
            raise UserError(
                f"out: {self.folder} is in the way and holds no state of a growth; move it, or choose "
                "another folder"
            )

    def put(self, piece: str, arrays: Mapping[str, np.ndarray], record: Any) -> None:
        """Keep arrays by name and whatever JSON can say."""
        metadata = {"growth": self.key, "record": json.dumps(record)}
        self.folder.mkdir(exist_ok=True)
        with whole_file(self._file(piece)) as partial:
            save_file(dict(arrays), partial, metadata)

    def holds(self, piece: str) -> bool:
        """Check whether this growth has kept a piece."""
        return _metadata(self._file(piece)).get("growth") == self.key

    def get(self, piece: str) -> tuple[dict[str, np.ndarray], Any] | None:
        """The arrays of a piece and what was said of them; None where this growth has kept none."""
        if not self.holds(piece):
            return None
        with safe_open(self._file(piece), "np") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            record = opened.metadata()["record"]
        return arrays, json.loads(record)

    def _file(self, piece: str) -> Path:
        return self.folder / f"{piece}{ENDING}"


def remove_pieces(folder: Path) -> None:
    """Remove a folder of pieces, if there is one; anything else in it stays."""
    if not folder.is_dir():
        return
    for file in folder.iterdir():
        if not _is_foreign(file):
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_foreign(file: Path) -> bool:
    """Check for what is neither a piece nor the beginning of one that a kill left behind."""
    if file.name.endswith(f"{ENDING}.partial"):
        return False
    return file.suffix != ENDING or "growth" not in _metadata(file)


def _metadata(file: Path) -> dict[str, str]:
    """Read what a file of tensors says of them; nothing where it is no file of tensors."""
    try:
        with safe_open(file, "np") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def fingerprint(reader: Reader, names: Iterable[str]) -> str:
    """Hash the names and values of tensors, one in memory at a time."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(reader.read(name).tobytes())
    return digest.hexdigest()
