"""Tokens that other tools made, trained on where they lie: nothing is copied, and beside the tokenizer the
folder holds a manifest alone.

They are read once from end to end, when they are first opened or a file has changed: every id is held against
the tokenizer, counted and hashed. Whether the tokenizer named is the one that cut them is measured: pieces of
them are decoded and cut again. The right tokenizer gives the same ids; one that learnt its merges from a text
that is larger by a sixtieth gives 0.93 of them, any other fewer.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import one_at_a_time, whole_folder
from outgrow.train.data.settings import DataSettings
from outgrow.train.data.shards import (
    SPLITS,
    TOKENIZER,
    TokenData,
    fingerprint,
    open_data,
    read_manifest,
    write_manifest,
)
from outgrow.train.data.token_files import TokenFile, common_types, find
from outgrow.train.data.tokenizer import (
    described,
    encoder,
    entries,
    load_tokenizer,
    save_tokenizer,
    tokenizer_identity,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
CHUNK = 2**18  # ids that are read at a time
PIECES, PIECE = 64, 512  # of how many ids each, that are decoded and cut again
SAME = 0.98  # of their ids, at least, are the same for the tokenizer that cut them
CHECKED_ENDS = 1000  # documents of an index whose last id is looked at


def open_tokens(settings: DataSettings, *, progress: bool = True) -> TokenData:
    """The tokens of `settings`, checked where that has not been done or a file has changed.

    Raises:
        UserError: there are none, a file is cut off, an id is none of the tokenizer's, or another tokenizer
        cut them.
    """
    folder = settings.home
    files = _files(settings)
    identity = {
        "settings": _identity(settings),
        "inputs": {name: _stamps(part) for name, part in files.items()},
    }
    if not _is_current(folder, identity):
        with one_at_a_time(folder):
            if not _is_current(folder, identity):  # not checked by another while we waited
                _check(folder, settings, files, identity, progress)
    return open_data(folder)


def _files(settings: DataSettings) -> dict[str, list[TokenFile]]:
    """The files that are trained on, and those that are validated on: none, where the end of each of the
    former is."""
    validation: list[TokenFile] = []
    if settings.validation_path:
        validation = find(settings.validation_path, "data.validation_path")
    held_out = {file.path for file in validation}
    files = find(settings.path or "", "data.path")
    train = [file for file in files if file.path not in held_out]
    if not train:
        raise UserError(
            f"data.validation_path={settings.validation_path}: all files of data.path are among them; none "
            "is left to train on"
        )
    return {"train": train, "validation": validation}


def _identity(settings: DataSettings) -> dict[str, Any]:
    share = None if settings.validation_path else settings.validation_fraction
    tokenizer = tokenizer_identity(settings.tokenizer)
    return {"format": FORMAT, "corpus": settings.corpus, "tokenizer": tokenizer, "validation_fraction": share}


def _stamps(files: Sequence[TokenFile]) -> list[list[Any]]:
    """The path, size and time of each file, by which a change of it is known."""
    stamps = []
    for file in files:
        modified = file.path.stat().st_mtime_ns
        path = str(file.path)
        stamps.append([path, file.size, modified])
    return stamps


def _is_current(folder: Path, identity: dict[str, Any]) -> bool:
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    values = {key: manifest[key] for key in identity}
    return values == identity


# ---- checking ----------------------------------------------------------------------------------------------


@dataclass
class Part:
    """Ids [first, stop) of a file, which are of one split."""

    file: TokenFile
    first: int
    stop: int


@dataclass
class Count:
    """The contents of the parts of a split, counted."""

    counts: np.ndarray  # of each id, int64 (vocab,)
    documents: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)


def _check(
    folder: Path,
    settings: DataSettings,
    files: dict[str, list[TokenFile]],
    identity: dict[str, Any],
    progress: bool,
) -> None:
    """Read all files once, and write the manifest and the tokenizer."""
    tokenizer = load_tokenizer(str(settings.tokenizer))
    every = files["train"] + files["validation"]
    dtype = _type_of(every, tokenizer, str(settings.tokenizer))
    _check_ends(every, dtype, tokenizer, str(settings.tokenizer))
    parts = _parts(files, dtype, settings.validation_fraction, tokenizer.eos_token_id)
    if progress:
        size = sum(file.size for file in every)
        print(f"{folder}: checking {size:,} bytes of tokens", file=sys.stderr)
    counts = {}
    for name in SPLITS:
        nothing = np.zeros(entries(tokenizer), np.int64)
        counts[name] = Count(nothing)
        for part in parts[name]:
            _count(part, dtype, counts[name], tokenizer)
    manifest = identity | _contents(counts, dtype, tokenizer)
    with whole_folder(folder) as partial:
        save_tokenizer(tokenizer, partial / TOKENIZER)
        write_manifest(partial, manifest | {"fingerprint": fingerprint(manifest)})


def _contents(
    counts: dict[str, Count], dtype: np.dtype, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """The entries of the manifest beside whose files these are."""
    widths = token_bytes(tokenizer)
    splits = {
        name: {
            "documents": count.documents,
            "bytes": int(count.counts @ widths),
            "tokens": int(count.counts.sum()),
            "sha256": count.digest.hexdigest(),
            "shards": count.shards,
        }
        for name, count in counts.items()
    }

    def total(key: str) -> int:
        return sum(split[key] for split in splits.values())

    return {
        "read": {"documents": total("documents"), "bytes": total("bytes")},
        "cleaning": {"removed": {}},
        "short": {},
        "tokenizer": described(tokenizer),
        "dtype": dtype.str,
        "splits": splits,
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def _count(part: Part, dtype: np.dtype, count: Count, tokenizer: PreTrainedTokenizerFast) -> None:
    """Add a part to what is known of its split.

    Raises:
        UserError: an id is none of the tokenizer's.
    """
    file = part.file
    end_of_text = tokenizer.eos_token_id
    ids = file.ids(dtype)
    most = len(count.counts)
    ends_before = int(count.counts[end_of_text])
    for first in range(part.first, part.stop, CHUNK):
        stop = min(part.stop, first + CHUNK)
        piece = ids[first:stop]
        lowest = int(piece.min())
        highest = int(piece.max())
        if lowest < 0 or highest >= most:
            is_unknown = (piece >= most) | (piece < 0)
            position = first + int(is_unknown.argmax())
            raise UserError(
                f"{file.path}: the id at place {position:,} is {ids[position]:,}, and data.tokenizer has "
                f"{most:,} entries: another tokenizer cut it, or it is damaged"
            )
        count.counts += np.bincount(piece, minlength=most)
        count.digest.update(piece.tobytes())
    if file.documents is not None:
        documents = file.documents_before(part.stop)
        documents -= file.documents_before(part.first)
    else:  # a last document whose end is not there is one too
        is_open = ids[part.stop - 1] != end_of_text
        ends = int(count.counts[end_of_text])
        documents = ends - ends_before + int(is_open)
    count.documents += int(documents)
    offset = file.offset + part.first * dtype.itemsize
    tokens = part.stop - part.first
    shard = {"file": str(file.path), "offset": offset, "tokens": tokens, "size": file.size}
    count.shards.append(shard)


# ---- what is held out --------------------------------------------------------------------------------------


def _parts(
    files: dict[str, list[TokenFile]], dtype: np.dtype, share: float, end_of_text: int
) -> dict[str, list[Part]]:
    """The files as they are where some are validated on; else the end of each is, from where a document
    ends."""
    whole_files: dict[str, list[Part]] = {}
    for name, of_split in files.items():
        whole_files[name] = [_file_part(file, dtype) for file in of_split]
    if whole_files["validation"]:
        return whole_files

    train = list[Part]()
    validation = list[Part]()
    for part in whole_files["train"]:
        length = part.stop
        held_out = max(1, round(length * share))
        goal = length - held_out
        cut = _cut(part.file, dtype, goal, end_of_text)
        if cut:
            train.append(Part(part.file, 0, cut))
        if cut < length:
            validation.append(Part(part.file, cut, length))
    if not train:
        raise UserError(f"data.validation_fraction: {share} of the tokens leaves none to train on; lower it")
    return {"train": train, "validation": validation}


def _file_part(file: TokenFile, dtype: np.dtype) -> Part:
    return Part(file, 0, len(file.ids(dtype)))


def _cut(file: TokenFile, dtype: np.dtype, goal: int, end_of_text: int) -> int:
    """The end of a document that is nearest behind `goal`, else in front of it; where there is none,
    `goal` itself."""
    ids = file.ids(dtype)
    if file.documents is not None:
        behind = file.documents_before(goal - 1)
        for number in (behind, behind - 1):
            end = file.end(number) if 0 <= number < file.documents else 0
            if 0 < end < len(ids):
                return end
        return goal

    def ends_in(first: int, stop: int) -> np.ndarray:
        """The ends of the documents whose end of text is in [first, stop)."""
        is_end = ids[first:stop] == end_of_text
        return first + 1 + np.flatnonzero(is_end)

    last = len(ids) - 1
    for first in range(max(0, goal - 1), last, CHUNK):
        ends = ends_in(first, min(last, first + CHUNK))
        if len(ends):
            return int(ends[0])
    for stop in range(goal, 0, -CHUNK):
        ends = ends_in(max(0, stop - CHUNK), stop)
        if len(ends):
            return int(ends[-1])
    return goal


# ---- whose tokens they are ---------------------------------------------------------------------------------


def _type_of(files: Sequence[TokenFile], tokenizer: PreTrainedTokenizerFast, name: str) -> np.dtype:
    """The type of the ids: where no file tells it, the first in which they are the tokenizer's.

    Raises:
        UserError: in none of them they are.
    """
    best = 0.0
    for dtype in common_types(files):
        sizes = [file.size - file.offset for file in files]
        if not any(size % dtype.itemsize for size in sizes):
            pieces = _pieces(files, dtype, tokenizer.eos_token_id)
            share = agreement(pieces, tokenizer)
            if share >= SAME:
                return dtype
            best = max(best, share)
    named = [file for file in files if file.tokenizer]
    hint = ""
    if named:
        first = named[0]
        hint = f"; {first.path.name} keeps the name {first.tokenizer!r}"
    raise UserError(
        f"data.tokenizer={name}: it is not the tokenizer of {files[0].path}: of pieces that are decoded "
        f"and cut again, {best:.0%} of the ids are the same{hint}; name the tokenizer that cut them"
    )


def _pieces(files: Sequence[TokenFile], dtype: np.dtype, end_of_text: int) -> Iterator[np.ndarray]:
    """Read some ids of some documents, from the documents' beginning where that is near; spread evenly over
    the files and in them."""
    count = min(len(files), PIECES)
    for number in _spread(count, len(files)):
        ids = files[number].ids(dtype)
        for start in _spread(PIECES // count, len(ids)):
            yield _piece(ids, start, end_of_text)


def _spread(count: int, length: int) -> Iterator[int]:
    """`count` numbers below `length`, evenly spread from 0."""
    return (length * i // count for i in range(count))


def _piece(ids: np.ndarray, start: int, end_of_text: int) -> np.ndarray:
    """Up to PIECE `ids` of one document, behind `start`: from its beginning where that is near."""
    part = ids[start : start + 8 * PIECE]
    ends = np.flatnonzero(part == end_of_text)
    first = 0
    if start and len(ends):  # the rest of a document goes before
        begin = int(ends[0]) + 1
        first = begin if begin < len(part) else 0
    later = ends[ends > first]
    end = int(later[0]) if len(later) else len(part)
    stop = min(end, first + PIECE)
    return part[first:stop]


def agreement(pieces: Iterator[np.ndarray], tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of the ids of `pieces` that are there again when they are decoded and cut anew, special ones
    left out; 0 … 1."""
    cutter = encoder(tokenizer).tokenizer
    special = set(tokenizer.all_special_ids)
    most = entries(tokenizer)
    same = both = 0
    for piece in pieces:
        ids = [i for i in piece.tolist() if i not in special]
        both += 2 * len(ids)
        if ids and min(ids) >= 0 and max(ids) < most:
            text = cutter.decode(ids, skip_special_tokens=False)
            again = cutter.encode(text, add_special_tokens=False).ids
            matcher = SequenceMatcher(None, ids, again, autojunk=False)
            sizes = (block.size for block in matcher.get_matching_blocks())
            same += 2 * sum(sizes)
            both += len(again) - len(ids)
    return same / max(1, both)


def _check_ends(
    files: Sequence[TokenFile], dtype: np.dtype, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    """Refuse documents of an index that do not end with the tokenizer's end of text."""
    for file in files:
        ids = file.ids(dtype)
        documents = file.documents or 0
        count = min(documents, CHECKED_ENDS)
        spread = np.linspace(0, documents - 1, count)
        numbers = spread.astype(np.int64).tolist()
        ends = map(file.end, numbers)
        last = [int(ids[end - 1]) for end in ends if end]
        right = last.count(tokenizer.eos_token_id)
        if last and right < 0.9 * len(last):
            other = max(set(last), key=last.count)
            raise UserError(
                f"{file.path}: its documents do not end with the end of text of data.tokenizer={name} "
                f"({tokenizer.eos_token!r}, {tokenizer.eos_token_id}), most often with "
                f"{tokenizer.convert_ids_to_tokens(other)!r} ({other}); cut them with it (datatrove: "
                "eos_token; Megatron: --append-eod), or give a tokenizer whose eos_token is theirs"
            )


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The bytes of text, in UTF-8, that each id stands for, int64 (vocab,): exact for byte-level tokenizers;
    special tokens stand for none.

    For the others, ▁ is a space and <0x41> one byte; what they change in a text before they cut it is not
    counted.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps(state["decoder"])
    added = {
        token["content"]: 0 if token["special"] else len(token["content"].encode())
        for token in state["added_tokens"]
    }
    widths = np.zeros(entries(tokenizer), np.int64)
    for token, number in tokenizer.get_vocab().items():
        width = len(token) if byte_level else _plain_width(token)
        widths[number] = added.get(token, width)
    return widths


def _plain_width(token: str) -> int:
    """The bytes that an entry of a vocabulary of characters stands for."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return 1
    text = token.replace("▁", " ")
    return len(text.encode())
