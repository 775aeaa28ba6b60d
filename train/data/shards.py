"""Tokens on disk: per split one sequence of ids, cut into raw little-endian files, described by a manifest
that is written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.model.keys import without

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "validation")


def dtype_of(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class Tokens:
    """The ids of one split, 1-D, as if its shards were one array; a slice is a view where it stays within a
    shard."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = list(shards)
        lengths = [len(shard) for shard in shards]
        self._ends = np.cumsum(lengths)
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in order; found a step of {step}")
        first = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < stop:
            shard = self._shards[first]
            shard_end = int(self._ends[first])
            base = shard_end - len(shard)
            end = min(stop, shard_end)
            part = shard[start - base : end - base]
            parts.append(part)
            start = end
            first += 1
        if len(parts) == 1:
            return parts[0]
        nothing = np.empty(0, self.dtype)
        return np.concatenate([*parts, nothing])


@dataclass(frozen=True)
class TokenSplit:
    """The training or the validation part."""

    name: str
    tokens: Tokens
    documents: int
    bytes: int  # of text, in UTF-8

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """The end-of-text ids counted in: they are predicted too."""
        return self.bytes / self.count


@dataclass(frozen=True)
class TokenData:
    """A corpus, tokenised and opened."""

    folder: Path
    train: TokenSplit
    validation: TokenSplit
    vocab_size: int  # one more than the largest id
    end_of_text_id: int
    # of the tokens and the tokenizer: the same text cut the same way has the same, wherever it lies
    fingerprint: str

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / TOKENIZER


def split_entry(folder: Path, shards: Sequence[Any]) -> dict[str, Any]:
    """The manifest's entry of the shards of a split: their names and tokens, and a hash of all bytes."""
    digest = hashlib.sha256()
    for shard in shards:
        _hash_file(folder / shard.file, digest)
    return {
        "sha256": digest.hexdigest(),
        "shards": [{"file": shard.file, "tokens": shard.tokens} for shard in shards],
    }


def _hash_file(path: Path, digest: Any, offset: int = 0, size: int | None = None) -> None:
    """Add `size` bytes of a file, from `offset` on, to a hash; None for all of them."""
    left = size
    if left is None:
        left = path.stat().st_size - offset
    with path.open("rb") as file:
        file.seek(offset)
        while raw := file.read(min(left, 2**22)):
            digest.update(raw)
            left -= len(raw)


# ---- the manifest ------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, the last file of a token folder, and see it on disk."""
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`; None where nothing is.

    Raises:
        UserError: the folder holds something else, or the manifest cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        is_other = folder.exists() and not path.exists()
        if is_other and _holds_something(folder):
            raise UserError(
                f"{folder}: there, but no token folder (no {MANIFEST}); move it away, or choose another "
                "data.folder"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read: {error}") from error
    try:
        matches = manifest["fingerprint"] == fingerprint(manifest)
    except (KeyError, TypeError, AttributeError):
        raise _damaged(folder, f"{MANIFEST} is not a manifest of tokens") from None
    if not matches:
        raise _damaged(folder, f"{MANIFEST} does not match its own fingerprint: it has been changed")
    return manifest


def _holds_something(path: Path) -> bool:
    """Check for a file, or a folder that is not empty."""
    return not path.is_dir() or any(path.iterdir())


def fingerprint(manifest: dict[str, Any]) -> str:
    """A hash of the ids and what they mean, whatever the shards' size and the corpus' place."""
    splits = {name: without(split, ("shards",)) for name, split in manifest["splits"].items()}
    meaning = [manifest["tokenizer"], manifest["dtype"], splits]
    text = json.dumps(meaning, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def open_data(folder: str | Path) -> TokenData:
    """Map the shards of a built folder; nothing is read yet.

    Raises:
        UserError: it is not there, or a file is missing or not as long as the manifest says.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no tokens here; build them: outgrow corpus prepare data=NAME")
    if not (folder / TOKENIZER / "tokenizer.json").is_file():
        raise _damaged(folder, f"{TOKENIZER}/tokenizer.json is missing")
    splits = {name: _open_split(folder, name, manifest) for name in SPLITS}
    tokenizer = manifest["tokenizer"]
    return TokenData(
        folder,
        splits["train"],
        splits["validation"],
        tokenizer["vocab_size"],
        tokenizer["end_of_text_id"],
        manifest["fingerprint"],
    )


def open_prepared(folder: Path) -> TokenData:
    """Open a folder that may have been made elsewhere, after a look at where its manifest points.

    Raises:
        UserError: as `open_data` does; or a shard lies outside the folder.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if manifest is None:
        raise UserError(
            f"data.path={folder}: no tokens here; give a folder that `outgrow corpus prepare` made, or "
            "copy it here whole"
        )
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            name = shard["file"]
            if Path(name).name != name:
                raise UserError(
                    f"{folder}: its manifest names {name!r}, which lies outside; tokens that others made are "
                    "not copied into the folder: use data=tokens where they are"
                )
    return open_data(folder)


def check_data(folder: Path, advance: Callable[[int], None] = lambda size: None) -> None:
    """Read every shard and the tokenizer, and compare them with the manifest; `advance` is told the bytes
    read.

    Raises:
        UserError: something is not what was written.
    """
    from tokenizers import Tokenizer

    manifest = read_manifest(open_data(folder).folder)
    assert manifest is not None
    width = np.dtype(manifest["dtype"]).itemsize
    for name in SPLITS:
        digest = hashlib.sha256()
        entry = manifest["splits"][name]
        for shard in entry["shards"]:
            size = shard["tokens"] * width
            path = folder / shard["file"]
            offset = shard.get("offset", 0)
            _hash_file(path, digest, offset, size)
            advance(size)
        if digest.hexdigest() != entry["sha256"]:
            raise _damaged(folder, f"the {name} shards are not the bytes that the manifest tells of")
    path = folder / TOKENIZER / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path)).to_str()
    except Exception as error:  # the library raises a bare one
        raise _damaged(folder, f"{TOKENIZER}/tokenizer.json cannot be read ({error})") from error
    digest = hashlib.sha256(tokenizer.encode())
    if digest.hexdigest() != manifest["tokenizer"]["sha256"]:
        raise _damaged(folder, f"{TOKENIZER}/tokenizer.json is not the tokenizer that the manifest tells of")


def _open_split(folder: Path, name: str, manifest: dict[str, Any]) -> TokenSplit:
    dtype = np.dtype(manifest["dtype"])
    entry = manifest["splits"][name]
    shards = []
    for shard in entry["shards"]:
        # tokens that others made lie elsewhere, and may be a part of a file
        path = folder / shard["file"]
        tokens = shard["tokens"]
        expected = shard.get("size", tokens * dtype.itemsize)
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            fault = "is missing" if size is None else f"has {size}"
            raise _damaged(folder, f"{shard['file']} should have {expected} bytes, {fault}")
        offset = shard.get("offset", 0)
        mapped = np.memmap(path, dtype, "r", offset, (tokens,))
        shards.append(mapped.view(np.ndarray))
    documents = entry["documents"]
    size = entry["bytes"]
    return TokenSplit(name, Tokens(shards), documents, size)


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: {what}; delete the folder, and it is built again, or copied")
