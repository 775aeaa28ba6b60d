"""Files of token ids as other tools write them, described without being read: one function a format.

datatrove, nanotron    NAME.ds raw ids, NAME.ds.index where documents end (uint64), NAME.ds.metadata
                       "tokenizer|bytes of an id", tokens
Megatron               NAME.bin raw ids, NAME.idx their type, the length and place of each sequence, the
                       sequences that begin documents
OLMo-core, dolma       NAME.npy raw ids, in spite of the name; a file that NumPy saved is read by its header
llm.c, modded-nanogpt  NAME.bin with a header of 256 int32: magic, version, tokens
nanoGPT                NAME.bin raw ids

Every length that a file tells of is held against the size of the file before anything is mapped, so that a
file that was cut off is told.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

import numpy as np

from outgrow.model.base.errors import UserError, reading

# What raw ids may be, where nothing says it. The wider first: two of 2 bytes are hardly ever one of 4 that a
# vocabulary has, but one of 4 is two of 2, the second of them 0, which may be a tokenizer's end of text.
RAW = (np.dtype("<u4"), np.dtype("<u2"))
MEGATRON_MAGIC, MEGATRON_HEADER = b"MMIDIDX\x00\x00", 34
# megatron.core.datasets.indexed_dataset.DType; the others hold no ids
MEGATRON_TYPES = {3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LLM_C_HEADER = 1024
LLM_C_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): GPT-2's ids, Llama 3's
NUMPY_MAGIC = b"\x93NUMPY"
PIECE = 2**22  # sequences of an index that are checked at a time


@dataclass(frozen=True)
class TokenFile:
    """One sequence of ids in a file.

    Attributes:
        offset: bytes before the first id.
        dtypes: what an id may be; one, where the file tells it.
        documents: how many the index tells of; None where there is no index.
        end: the number of ids up to the end of document i of the index.
        tokenizer: the name that the file keeps of its tokenizer.
    """

    path: Path
    offset: int
    dtypes: tuple[np.dtype, ...]
    documents: int | None = None
    end: Callable[[int], int] = int
    tokenizer: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.path.stat().st_size

    def ids(self, dtype: np.dtype) -> np.ndarray:
        """The ids, mapped, (n,)."""
        path = self.path
        offset = self.offset
        return np.memmap(path, dtype, "r", offset).view(np.ndarray)

    def documents_before(self, position: int) -> int:
        """The number of documents of the index that end at or before `position`, counted in ids."""
        numbers = range(self.documents or 0)
        return bisect_left(numbers, position + 1, key=self.end)


def find(path: str, key: str) -> list[TokenFile]:
    """The token files under a folder (links are not followed), of a glob, or one file, sorted by name.

    Raises:
        UserError: there is none, or one is not what its name says; the message names the setting `key`.
    """
    root = Path(path).expanduser()
    names = _named(root)
    readable = [name for name in names if name.suffix in READERS]
    token_files = sorted(name for name in readable if name.is_file())
    if not token_files:
        reason = "no such token file"
        if root.is_dir():
            reason = f"none of its {len(names)} files ends in {' '.join(READERS)}"
        suffixes = ", ".join(READERS)
        raise UserError(f"{key}={path}: {reason}; give a folder, a glob or a file of {suffixes}")
    files: list[TokenFile] = []
    faults: list[str] = []
    for name in token_files:
        try:
            files.append(describe(name))
        except UserError as fault:
            faults.append(str(fault))
    UserError.collect(faults)
    return files


def _named(root: Path) -> list[Path]:
    """The files under a folder, those of a glob, or the one file."""
    pattern = str(root)
    if root.is_dir():
        names: list[Path] = []
        for folder, _, entries in os.walk(root):
            names += [Path(folder, name) for name in entries]
        return names
    if has_magic(pattern) and not root.exists():
        matches = glob(pattern, recursive=True)
        return list(map(Path, matches))
    return [root]


def describe(path: Path) -> TokenFile:
    """Describe what lies in one file.

    Raises:
        UserError: it is cut off, empty, or not what its header or its index says.
    """
    with reading(path):
        reader = READERS[path.suffix]
        file = reader(path.resolve())
        width = min(dtype.itemsize for dtype in file.dtypes)
        size = file.size - file.offset
        if size <= 0 or size % width:
            raise _cut(path, f"{file.size:,} bytes are no whole number of ids")
        return file


# ---- one function a format ---------------------------------------------------------------------------------


def _datatrove(path: Path) -> TokenFile:
    index = path.with_name(f"{path.name}.index")
    metadata = path.with_name(f"{path.name}.metadata")
    mask = path.with_name(f"{path.name}.loss")
    if mask.exists():
        raise UserError(
            f"{path}: it has a loss mask (.ds.loss), which is not read; move the mask away to train on "
            "every token"
        )
    tokenizer, width, tokens = _metadata(metadata) if metadata.is_file() else (None, None, None)
    size = path.stat().st_size
    ends = _index(index) if index.is_file() else None
    if ends is not None:
        last = int(ends[-1])
        tokens = tokens or last
        if last != tokens:
            raise _cut(
                index,
                f"its documents end after {last:,} ids, and {metadata.name} tells of {tokens:,}",
            )
    if tokens is None:
        return TokenFile(path, 0, RAW, tokenizer=tokenizer)
    kinds = _kinds_that_fit(size, tokens, width)
    if not kinds:
        widths = f"{width} bytes" if width else "2 or 4 bytes"
        raise _cut(path, f"it should have {tokens:,} ids of {widths}, and has {size:,} bytes")
    if ends is None:
        return TokenFile(path, 0, kinds, tokenizer=tokenizer)
    return TokenFile(path, 0, kinds, len(ends), ends.item, tokenizer)


def _kinds_that_fit(size: int, tokens: int, width: int | None) -> tuple[np.dtype, ...]:
    """The types of which so many ids take so many bytes; of one width alone where the file tells it."""
    possible = [kind for kind in RAW if width in (None, kind.itemsize)]
    return tuple(kind for kind in possible if kind.itemsize * tokens == size)


def _metadata(path: Path) -> tuple[str, int | None, int]:
    """The tokenizer's name, the bytes of an id, and the number of ids."""
    try:
        text = path.read_text(encoding="utf-8")
        name, tokens, *_ = text.splitlines()
        stem, _, width = name.rpartition("|")
        if width.isdigit():
            return stem, int(width), int(tokens)
        return name, None, int(tokens)
    except ValueError as error:
        raise _cut(path, f"not what datatrove writes ({error})") from None


def _index(path: Path) -> np.ndarray:
    """The ends of documents, counted in ids, (documents,)."""
    size = path.stat().st_size
    if not size or size % 8:
        raise _cut(path, f"{size:,} bytes are no whole number of document ends")
    mapped = np.memmap(path, "<u8", "r")
    ends = mapped.view(np.ndarray)
    for first in range(0, len(ends), PIECE):
        stop = first + PIECE + 1  # with the first of the next piece
        piece = ends[first:stop]
        if _falls(piece.astype(np.int64)):
            raise _cut(path, "a document ends before the one in front of it")
    return ends


def _falls(numbers: np.ndarray) -> bool:
    """Check whether a number is less than the one before it."""
    steps = np.diff(numbers)
    is_fall = steps < 0
    return bool(is_fall.any())


def _bin(path: Path) -> TokenFile:
    index = path.with_suffix(".idx")
    if index.is_file():
        return _megatron(path, index)
    with path.open("rb") as file:
        head = file.read(12)
    magic = version = tokens = 0
    if len(head) == 12:
        magic, version, tokens = struct.unpack("<3i", head)
    kind = LLM_C_TYPES.get((magic, version))
    if kind is None:
        return TokenFile(path, 0, RAW)
    dtype = np.dtype(kind)
    size = path.stat().st_size
    expected = LLM_C_HEADER + tokens * dtype.itemsize
    if size != expected:
        raise _cut(path, f"its header tells of {tokens:,} ids, {expected:,} bytes, and it has {size:,}")
    return TokenFile(path, LLM_C_HEADER, (dtype,))


def _megatron(path: Path, index: Path) -> TokenFile:
    size = path.stat().st_size
    index_size = index.stat().st_size
    dtype, sequences, bounds = _megatron_header(index)
    # behind the header: an int32 length and an int64 offset for each sequence, then int64 bounds of documents
    offsets_begin = 4 * sequences
    bounds_begin = 12 * sequences
    bounds_end = bounds_begin + 8 * bounds
    expected = MEGATRON_HEADER + bounds_end
    fits = index_size in (expected, expected + sequences)  # the latter with a mode for each sequence
    if not fits or not sequences or bounds < 2:
        raise _cut(
            index,
            (
                f"its header tells of {sequences:,} sequences and {bounds:,} bounds, {expected:,} bytes; "
                f"it has {index_size:,}"
            ),
        )
    raw = np.memmap(index, np.uint8, "r", MEGATRON_HEADER)
    lengths = raw[:offsets_begin].view("<i4")
    offsets = raw[offsets_begin:bounds_begin].view("<i8")
    documents = raw[bounds_begin:bounds_end].view("<i8")
    width = dtype.itemsize
    _check_offsets(index, lengths, offsets, width)
    last_bytes = int(lengths[-1]) * width
    total = int(offsets[-1]) + last_bytes
    if total != size:
        raise _cut(path, f"{index.name} tells of {total:,} bytes, and it has {size:,}")
    first = documents[0]
    last = documents[-1]
    covers_all = first == 0 and last == sequences
    if not covers_all or _falls(documents):
        raise _cut(index, f"its documents do not run from sequence 0 to {sequences:,}")

    def end(number: int) -> int:
        """The end of a document: where the first sequence after it begins."""
        after = int(documents[number + 1])
        offset = size if after == sequences else int(offsets[after])
        return offset // width

    return TokenFile(path, 0, (dtype,), bounds - 1, end)


def _megatron_header(index: Path) -> tuple[np.dtype, int, int]:
    """Read what an index of Megatron's tells of: the type of an id, and the numbers of sequences and of
    bounds of documents.
    """
    with index.open("rb") as file:
        head = file.read(MEGATRON_HEADER)
    is_complete = len(head) == MEGATRON_HEADER
    if not is_complete or not head.startswith(MEGATRON_MAGIC):
        raise _cut(index, "it does not begin as an index of Megatron's (MMIDIDX)")
    numbers = head.removeprefix(MEGATRON_MAGIC)
    version, code, sequences, bounds = struct.unpack("<QBQQ", numbers)
    if version != 1 or code not in MEGATRON_TYPES:
        raise UserError(
            f"{index}: version {version}, type {code} of an id; known: version 1, types "
            f"{sorted(MEGATRON_TYPES)}"
        )
    return np.dtype(MEGATRON_TYPES[code]), sequences, bounds


def _check_offsets(index: Path, lengths: np.ndarray, offsets: np.ndarray, width: int) -> None:
    """Refuse sequences that do not lie one behind the other."""
    after = 0
    for first in range(0, len(lengths), PIECE):
        piece = slice(first, first + PIECE)
        counts = lengths[piece].astype(np.int64)
        sizes = counts * width
        ends = after + np.cumsum(sizes)
        begins = np.concatenate([[after], ends[:-1]])
        adjacent = np.array_equal(begins, offsets[piece])
        is_negative = sizes < 0
        if not adjacent or is_negative.any():
            raise _cut(index, "its sequences do not lie one behind the other")
        after = int(ends[-1])


def _npy(path: Path) -> TokenFile:
    with path.open("rb") as file:
        if file.read(len(NUMPY_MAGIC)) != NUMPY_MAGIC:
            return TokenFile(path, 0, RAW)
        file.seek(0)
        npy = np.lib.format
        try:
            first = npy.read_magic(file) == (1, 0)
            read = npy.read_array_header_1_0 if first else npy.read_array_header_2_0
            shape, _, dtype = read(file)
        except ValueError as error:
            raise _cut(path, f"NumPy cannot read its header ({error})") from None
        offset = file.tell()
    if len(shape) != 1 or dtype.kind not in "iu":
        raise UserError(f"{path}: an array of shape {shape} and type {dtype}; ids are one row of integers")
    size = path.stat().st_size
    count = shape[0]
    width = dtype.itemsize
    expected = offset + count * width
    if size != expected:
        raise _cut(
            path,
            f"its header tells of {count:,} ids of {width} bytes, and it has {size:,} bytes",
        )
    return TokenFile(path, offset, (dtype,))


def _cut(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}: it is cut off or damaged; copy or write it again")


Reader = Callable[[Path], TokenFile]
READERS: dict[str, Reader] = {".ds": _datatrove, ".bin": _bin, ".npy": _npy}


def common_types(files: Sequence[TokenFile]) -> tuple[np.dtype, ...]:
    """The types that the ids of all files may be.

    Raises:
        UserError: none is one of all of them.
    """
    first = files[0]
    common = list(first.dtypes)
    for file in files:
        common = [dtype for dtype in common if dtype in file.dtypes]
    if not common:
        kinds = set(first.dtypes)
        other = next(file for file in files if kinds.isdisjoint(file.dtypes))
        raise UserError(
            f"{first.path}: ids of type {first.dtypes[0]}, and {other.path} has {other.dtypes[0]}; "
            "read them as two sources of a mixture"
        )
    return tuple(common)
