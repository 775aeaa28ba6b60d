"""Tokenise what was kept, task by task, and pack it into shards.

A shard's bytes are a function of the text and the settings: each is cut out of the sequence of all tokens of
its split, whichever task made them. A document is held out for validation by a hash of its text, so copies
lie on one side.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.data import DocumentsPipeline as Documents
from datatrove.pipeline.base import PipelineStep

from outgrow.model.base.files import whole_file
from outgrow.train.corpus.verdicts import Verdicts
from outgrow.train.corpus.workshop import Row, Workshop
from outgrow.train.data.settings import DataSettings
from outgrow.train.data.shards import SPLITS
from outgrow.train.data.tokenizer import Encoder, read_encoder

ENCODER = "encoder.json"  # in the workshop: the tokenizer as the workers load it
BATCH_BYTES = 2**18  # of text, tokenised at a time: the library needs some 60 bytes for each


class Kept(PipelineStep):
    """The documents of a task that stay."""

    type, name = "📖 - READER", "kept"

    def __init__(self, work: Workshop) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Documents:
        for row in kept_rows(self.work, Verdicts(self.work), rank):
            yield row.document


def kept_rows(work: Workshop, verdicts: Verdicts, task: int) -> Iterator[Row]:
    """The documents of a task that stay, in order."""
    is_kept = verdicts.kept(task)
    for row in work.rows(task):
        if row.number >= len(is_kept):  # behind a limit
            return
        if is_kept[row.number]:
            yield row


def held_out(digest: bytes, settings: DataSettings) -> bool:
    """Check whether the document with this digest of its text is for validation: a keyed hash, so no other
    document and no order plays a part.
    """
    return split_key(digest, settings.seed) < settings.validation_fraction * 2**64


def split_key(digest: bytes, seed: int) -> int:
    """64 bits that are spread evenly."""
    key = f"validation {seed}".encode()
    keyed = hashlib.blake2b(digest, key=key, digest_size=8)
    return int.from_bytes(keyed.digest(), "big")


# ---- tokens ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """The documents of one task that were tokenised, in order; each array is 1-D, one entry a document (two
    of one that is cut)."""

    row: np.ndarray  # its place in the task
    tokens: np.ndarray  # with the end of text
    bytes: np.ndarray
    validation: np.ndarray  # bool

    def __getitem__(self, where: slice | np.ndarray) -> Lengths:
        columns = (self.row, self.tokens, self.bytes, self.validation)
        return Lengths(*(column[where] for column in columns))

    def of(self, split: str) -> Lengths:
        return self[self.validation == (split == "validation")]

    @classmethod
    def load(cls, work: Workshop, task: int) -> Lengths:
        with np.load(work.path("lengths", task, ".npz")) as arrays:
            return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Split:
    """The choice of documents that are held out. Where the hash of the texts leaves a part empty, one text is
    named; one alone is cut. Copies of a text go where it goes.
    """

    settings: DataSettings
    named: bytes | None = None  # the digest of a text: it goes to the other part than its hash says
    cut: bool = False  # the one text: its last part is held out

    def parts(self, document: Document) -> list[tuple[str, bool]]:
        """The text, or both parts of it, each with whether it is held out."""
        if self.cut:
            cut = _cut(document.text, self.settings.validation_fraction)
            begin = document.text[:cut]
            end = document.text[cut:]
            return [(begin, False), (end, True)]
        digest = document.metadata["digest"]
        by_hash = held_out(digest, self.settings)
        return [(document.text, by_hash != (digest == self.named))]


def _cut(text: str, share: float) -> int:
    """The position at which the last `share` of a text begins: at a paragraph, else a line, else a word."""
    length = len(text)
    goal = max(1, round(length * (1 - share)))
    for end in ("\n\n", "\n", " "):
        position = text.rfind(end, length // 2, goal)
        if position >= 0:
            return position + len(end)
    return goal


class Tokenise(PipelineStep):
    """Write the ids of a task's documents, a file for each split; each document ends with the end of text."""

    type, name = "🔢 - TOKENIZER", "tokenise"

    def __init__(self, work: Workshop, split: Split, dtype: np.dtype) -> None:
        super().__init__()
        self.work = work
        self.split = split
        self.dtype = dtype

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:
        path = self.work.folder / ENCODER
        encoder = _encoder(path, path.stat().st_mtime_ns)
        kinds = {"row": np.int64, "tokens": np.int64, "bytes": np.int64, "validation": bool}
        columns = {name: array("q") for name in kinds}
        with ExitStack() as stack:
            files = {}
            for name in SPLITS:
                ids_file = self.work.path("ids", rank, f".{name}.bin")
                partial = stack.enter_context(whole_file(ids_file))
                files[name] = stack.enter_context(partial.open("wb"))
            for batch in in_batches(self._parts(data)):
                texts = [text for _, text, _ in batch]
                encoded = encoder.encode(texts)
                for (row, text, validation), ids in zip(batch, encoded, strict=True):
                    split = "validation" if validation else "train"
                    raw = np.array(ids, self.dtype)
                    files[split].write(raw.tobytes())
                    columns["row"].append(row)
                    columns["tokens"].append(len(ids))
                    columns["bytes"].append(len(text.encode()))
                    columns["validation"].append(validation)
                counts = columns["tokens"][-len(batch) :]
                self.stat_update("tokens", value=sum(counts))
        arrays = {}
        for name, kind in kinds.items():
            arrays[name] = np.array(columns[name], kind)
        lengths = self.work.path("lengths", rank, ".npz")
        with whole_file(lengths) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def _parts(self, data: Any) -> Iterator[tuple[int, str, bool]]:
        for document in data or ():
            for text, validation in self.split.parts(document):
                yield document.metadata["row"], text, validation


@lru_cache(maxsize=1)
def _encoder(path: Path, changed: int) -> Encoder:
    return read_encoder(path.read_text())


def in_batches(parts: Iterable[tuple[int, str, bool]]) -> Iterator[list[tuple[int, str, bool]]]:
    """Texts in lists of some BATCH_BYTES."""
    batch = list[tuple[int, str, bool]]()
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part[1])
        if size >= BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


# ---- shards ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One file of a split: its tokens [start, start + tokens) of all."""

    split: str
    number: int
    start: int
    tokens: int

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.bin"


def shards_of(split: str, tokens: int, limit: int) -> list[Shard]:
    """A split of so many tokens, cut into shards of `limit` but for the last."""
    return [
        Shard(split, number, start, min(limit, tokens - start))
        for number, start in enumerate(range(0, tokens, limit))
    ]


class Pack(PipelineStep):
    """Write one shard a task, out of the ids of all tasks."""

    type, name = "💽 - WRITER", "pack"

    def __init__(
        self, work: Workshop, folder: Path, shards: list[Shard], ends: dict[str, list[int]], dtype: np.dtype
    ) -> None:
        """`ends`: of each split, how many tokens there are up to the end of each task."""
        super().__init__()
        self.work = work
        self.folder = folder
        self.shards = shards
        self.ends = ends
        self.dtype = dtype

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:
        shard = self.shards[rank]
        path = self.folder / shard.file
        with whole_file(path) as partial, partial.open("wb") as out:
            for piece in self._pieces(shard):
                out.write(piece)

    def _pieces(self, shard: Shard) -> Iterator[bytes]:
        ends = self.ends[shard.split]
        width = self.dtype.itemsize
        start = shard.start
        stop = start + shard.tokens
        task = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            first = ends[task - 1] if task else 0
            end = min(stop, ends[task])
            if end > start:
                path = self.work.path("ids", task, f".{shard.split}.bin")
                offset = (start - first) * width
                size = (end - start) * width
                yield from _read(path, offset, size)
            start = max(start, end)
            task += 1


def _read(path: Path, start: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while size:
            piece = file.read(min(size, 2**22))
            if not piece:
                raise EOFError(f"{path}: shorter than its lengths say")
            size -= len(piece)
            yield piece
