"""From cleaned blocks to shards: workers tokenise, this process appends in order, and what is whole is not done again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from outgrow.model.base.files import whole_file
from outgrow.train.data.blocks import Workshop
from outgrow.train.data.corpus import is_validation
from outgrow.train.data.settings import DataSettings
from outgrow.train.data.shards import SPLITS, ShardWriter
from outgrow.train.data.tokenizer import read_encoder
from outgrow.train.data.workers import Run

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENCODER = "encoder.json"  # in the workshop: the tokenizer as the workers load it


@dataclass(frozen=True)
class Lengths:
    """The documents of one tokenised block that were kept, in order; each array is 1-D, one entry a document."""

    row: np.ndarray  # its place in the block
    tokens: np.ndarray  # with the end of text
    bytes: np.ndarray
    validation: np.ndarray  # bool

    def __getitem__(self, where: slice | np.ndarray) -> Lengths:
        return Lengths(self.row[where], self.tokens[where], self.bytes[where], self.validation[where])

    def of(self, split: str) -> Lengths:
        return self[self.validation == (split == "validation")]

    @classmethod
    def load(cls, work: Workshop, number: int) -> Lengths | None:
        """None where the block is not tokenised yet."""
        path = work.path("lengths", number, ".npz")
        if not path.is_file():
            return None
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


# ---- in a worker ----------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _encoder(path: Path, changed: int) -> Tokenizer:
    return read_encoder(path.read_text())


def encode_block(work: Workshop, number: int, kept: np.ndarray, settings: DataSettings, dtype: np.dtype, end: int) -> int:
    """Tokenise the documents of a block that are kept (bool, 1-D); each ends with the id `end`. Returns the block's number."""
    rows = np.flatnonzero(kept)
    names, texts = work.names(number), work.texts(number)
    texts = [texts[row] for row in rows]
    validation = np.array([is_validation(names[row], settings) for row in rows], bool)
    path = work.folder / ENCODER
    encodings = _encoder(path, path.stat().st_mtime_ns).encode_batch_fast(texts, add_special_tokens=False)
    ids = [np.array([*encoding.ids, end], dtype) for encoding in encodings]
    tokens, sizes = (np.array([len(part) for part in parts], np.int64) for parts in (ids, [text.encode() for text in texts]))
    for split in SPLITS:
        parts = [part for part, held_out in zip(ids, validation, strict=True) if held_out == (split == "validation")]
        with whole_file(work.path("ids", number, f".{split}.npy")) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate([*parts, np.empty(0, dtype)]))
    with whole_file(work.path("lengths", number, ".npz")) as partial, partial.open("wb") as file:  # the last: now the block is whole
        np.savez(file, row=rows, tokens=tokens, bytes=sizes, validation=validation)
    return number


# ---- in the process that packs --------------------------------------------------------------------------------------------------------


def pack(
    folder: Path,
    work: Workshop,
    kept: Callable[[int], np.ndarray],
    settings: DataSettings,
    dtype: np.dtype,
    end: int,
    run: Run,
    record: Callable[[int, Lengths], None],
) -> dict[str, ShardWriter]:
    """Write the shards of both splits into `folder`, up to limit_tokens; return them, closed.

    Args:
        kept: of a block's number, a bool for each of its documents.
        record: told the number of each block, and its documents that are in the shards.
    """
    writers = {split: ShardWriter(folder, split, dtype, settings.shard_tokens) for split in SPLITS}
    waiting: deque[tuple[int, dict[str, int]]] = deque()  # blocks whose ids may still be needed after a kill, and where they end
    for number, lengths in _encoded(work, kept, settings, dtype, end, run):
        taken = _up_to_the_limit(lengths, settings, sum(writer.tokens for writer in writers.values()))
        for split, writer in writers.items():
            _append(writer, work, number, split, taken.of(split))
        record(number, taken)
        waiting.append((number, {split: writer.tokens for split, writer in writers.items()}))
        while waiting and all(writers[split].finished >= tokens for split, tokens in waiting[0][1].items()):
            _forget_ids(work, waiting.popleft()[0])
        if len(taken.row) < len(lengths.row):
            break
    for writer in writers.values():
        writer.close()
    return writers


def _encoded(
    work: Workshop, kept: Callable[[int], np.ndarray], settings: DataSettings, dtype: np.dtype, end: int, run: Run
) -> Iterator[tuple[int, Lengths]]:
    """Each block in order, tokenised now or before."""

    numbers = range(len(work.blocks))
    missing = {number for number in numbers if Lengths.load(work, number) is None}
    fresh = run(encode_block, ((work, number, kept(number), settings, dtype, end) for number in sorted(missing)))
    for number in numbers:
        if number in missing:
            assert next(fresh) == number
        lengths = Lengths.load(work, number)
        assert lengths is not None
        yield number, lengths


def _up_to_the_limit(lengths: Lengths, settings: DataSettings, before: int) -> Lengths:
    """The document that reaches limit_tokens is the last."""
    if settings.limit_tokens is None:
        return lengths
    reached = before + np.cumsum(lengths.tokens) - lengths.tokens  # in front of each document
    return lengths[: int(np.searchsorted(reached, settings.limit_tokens))]


def _append(writer: ShardWriter, work: Workshop, number: int, split: str, taken: Lengths) -> None:
    tokens, documents, size = int(taken.tokens.sum()), len(taken.row), int(taken.bytes.sum())
    if writer.tokens + tokens <= writer.kept:
        writer.skip(tokens, documents, size)
    else:
        writer.write(np.load(work.path("ids", number, f".{split}.npy"), mmap_mode="r")[:tokens], documents, size)


def _forget_ids(work: Workshop, number: int) -> None:
    for split in SPLITS:
        work.path("ids", number, f".{split}.npy").unlink(missing_ok=True)
