"""Calibration text: windows of tokens that a learned growth is fitted on, and others that are held out."""

from __future__ import annotations

import filecmp
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.growth.passage import MOST_BYTES, text_of, tokenizer_of
from outgrow.model.base.errors import UserError, reading

KEY = "growth.text"
MANIFEST = "manifest.json"  # of a folder of tokens
ENDINGS = (".txt", ".md", ".rst", ".py")
SHARE, MOST_HELD_OUT = 8, 8  # for so many windows one more is held out, so many in all


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of text in the source's tokens.

    Attributes:
        name: of the file or folder.
        fit, held: (row, position) int64; what is fitted on, and what the loss is measured on.
    """

    name: str
    fit: np.ndarray
    held: np.ndarray

    @property
    def sha256(self) -> str:
        """Hash of the tokens, those that are fitted on first."""
        tokens = self.fit.tobytes() + self.held.tobytes()
        return hashlib.sha256(tokens).hexdigest()


def check_there(text: str) -> Path:
    """Look for a text without cutting it into tokens.

    Raises:
        UserError: there is none, or nothing is in it.
    """
    path = Path(text).expanduser()
    if not path.exists():
        raise UserError(f"{KEY} {text!r}: no such file or folder; give a text that is there")
    if (path / MANIFEST).is_file():
        _token_folder(path)
    elif all(not text_of(file, KEY).strip() for file in _files(path)):
        raise UserError(f"{KEY} {str(path)!r}: is empty; give some thousands of words of text")
    return path


def holds(text: str, file: str | Path) -> bool:
    """Check whether `file`, or a copy of it, is among the files of a text to learn on."""
    path, other = Path(text).expanduser(), Path(file).expanduser()
    is_tokens = (path / MANIFEST).is_file()
    if is_tokens or not path.exists() or not other.is_file():
        return False
    return any(filecmp.cmp(own, other, shallow=False) for own in _files(path))


def read_calibration(
    text: str, source: Path, vocabulary: int, context: int | None, *, tokens: int, window: int
) -> Calibration:
    """Windows spread evenly over a text.

    Args:
        text: a text file, a folder of text files, or a folder of tokens, of which the training part is taken.
        source: the folder with the tokenizer.
        vocabulary, context: the source's tokens and positions; None where nothing bounds those.

    Raises:
        UserError: there is no such text, it is empty or too short, or its tokens are not the source's.
    """
    path = check_there(text)
    is_tokens = (path / MANIFEST).is_file()
    ids = _token_folder(path) if is_tokens else _tokenised(path, source)
    window = min(window, context or window)
    rows = max(1, tokens // window)
    row_count = rows + _held_out(rows)
    count = min(row_count, len(ids) // window)
    if count < 2:
        raise UserError(
            f"{KEY} {text!r}: has {len(ids)} tokens; give a text of at least {2 * window}, better {tokens}"
        )
    last = len(ids) - window
    starts = [number * last // (count - 1) for number in range(count)]
    parts = [ids[start : start + window] for start in starts]
    windows = np.stack([np.asarray(part, np.int64) for part in parts])
    if (largest := int(windows.max())) >= vocabulary:
        raise UserError(
            f"{KEY} {text!r}: has token {largest}, and the source has {vocabulary} tokens; is it another "
            "tokenizer's?"
        )
    shares = count * SHARE
    held = _held_out(shares // (SHARE + 1))
    middles = 2 * np.arange(held) + 1
    numbers = middles * count // (2 * held)
    is_held = np.isin(np.arange(count), numbers)
    fit = windows[~is_held]
    return Calibration(text, fit, windows[is_held])


def _held_out(rows: int) -> int:
    """Number of windows that are held out beside so many that are fitted on."""
    return min(MOST_HELD_OUT, max(1, rows // SHARE))


def _files(path: Path) -> list[Path]:
    """The text file of that name, or the text files of a folder in the order of their names."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in ENDINGS)
    if not files:
        endings = ", ".join(ENDINGS)
        folder = str(path)
        raise UserError(f"{KEY} {folder!r}: holds no text file ({endings}) and no {MANIFEST}")
    return files


def _tokenised(path: Path, source: Path) -> np.ndarray:
    """The tokens of the text at `path`, the files of a folder one after another."""
    parts: list[str] = []
    size = 0
    for file in _files(path):
        part = text_of(file, KEY)
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            break
    text = "\n\n".join(parts)
    tokenizer = tokenizer_of(source, KEY)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(set(ids)) < 2:
        raise UserError(f"{KEY}: the folder {source} has no tokenizer that knows this text")
    return np.asarray(ids, np.int64)


def _token_folder(folder: Path) -> np.ndarray:
    """The training tokens that a run's text was cut into; the validation part is never read."""
    try:
        text = (folder / MANIFEST).read_text()
        manifest: dict[str, Any] = json.loads(text)
        dtype = np.dtype(manifest["dtype"])
        with reading(folder):
            first = manifest["splits"]["train"]["shards"][0]
            offset = first.get("offset", 0)
            shape = (first["tokens"],)
            file = folder / first["file"]
            return np.memmap(file, dtype, "r", offset, shape)
    except (ValueError, KeyError, TypeError, IndexError) as fault:
        raise UserError(f"{KEY} {str(folder)!r}: {MANIFEST} is not one of tokens ({fault})") from None
