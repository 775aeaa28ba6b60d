"""The workshop of a build: documents in blocks on disk, each a file that is whole or absent, so that a kill costs the blocks at work.

A block is a run of consecutive documents of some BLOCK_BYTES. Where blocks begin depends on the text alone, so neither the number of
workers nor a restart can change a byte of the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from outgrow.model.base.files import whole_file, write_json
from outgrow.train.data.benchmarks import read_benchmarks
from outgrow.train.data.document import Document, Tally
from outgrow.train.data.duplicates import signature
from outgrow.train.data.settings import CleaningSettings
from outgrow.train.data.text import normalised
from outgrow.train.data.words import word_hashes, words

BLOCK_BYTES = 2**21  # of text: small enough that cores end together, large enough that files stay few


@dataclass(frozen=True)
class Workshop:
    """`<folder>.partial/work`: where the blocks of a build lie until its shards are done."""

    folder: Path

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """To a worker goes the place alone, not what was read there."""
        return Workshop, (self.folder,)

    def path(self, kind: str, number: int, suffix: str) -> Path:
        return self.folder / kind / f"{number:06d}{suffix}"

    @property
    def plan(self) -> Path:
        """What this build is of; another one does not go on here."""
        return self.folder / "plan.json"

    @property
    def read(self) -> Path:
        """Written when the last block is."""
        return self.folder / "read.json"

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """How many documents each block has; known when all are read."""
        return tuple(json.loads(self.read.read_text())["blocks"])

    @property
    def tally(self) -> Tally:
        return Tally(**json.loads(self.read.read_text())["tally"])

    @property
    def starts(self) -> list[int]:
        """The number of each block's first document."""
        return [0, *np.cumsum(self.blocks, dtype=np.int64).tolist()]

    def tally_after(self, number: int) -> Tally | None:
        """How far the reading was at the end of a block; None where that block is not whole."""
        path = self.path("text", number, ".json")
        return Tally(**json.loads(path.read_text())) if path.is_file() else None

    def names(self, number: int) -> list[str]:
        return [_name(raw) for raw in self._column(number, "name")]

    def texts(self, number: int) -> list[str]:
        return self._column(number, "text")

    def sizes(self, number: int) -> np.ndarray:
        """Of each text in UTF-8, int64 (documents,)."""
        return np.array(self._column(number, "bytes"), np.int64)

    def digests(self, number: int) -> np.ndarray:
        """Of each text: two uint64, (documents, 2)."""
        return np.frombuffer(b"".join(self._column(number, "digest")), "<u8").reshape(-1, 2)

    def overlaps(self, number: int) -> list[str | None]:
        """What each text has in common with a benchmark, where that was asked for."""
        return self._column(number, "overlap")

    def signatures(self, number: int) -> np.ndarray:
        """MinHash values, mapped: uint32 (documents, permutations)."""
        return np.load(self.path("signatures", number, ".npy"), mmap_mode="r")

    def _column(self, number: int, name: str) -> list:
        import pyarrow.ipc

        with pyarrow.memory_map(str(self.path("text", number, ".arrow"))) as file:
            options = pyarrow.ipc.IpcReadOptions(included_fields=[FIELDS.index(name)], use_threads=False)
            return pyarrow.ipc.open_file(file, options=options).read_all().column(name).to_pylist()


FIELDS = ("name", "text", "bytes", "digest", "overlap")
BENCHMARKS = "benchmarks.npz"  # in the workshop: their n-grams


def in_blocks(found: Iterable[Document], tally: Tally) -> Iterator[tuple[list[str], list[str], Tally]]:
    """Names and texts of each block, and the tally where it ends."""
    names, texts, size = list[str](), list[str](), 0
    for document in found:
        names.append(document.name)
        texts.append(document.text)
        size += document.bytes
        if size >= BLOCK_BYTES:
            yield names, texts, Tally(**asdict(tally))
            names, texts, size = [], [], 0
    if names:
        yield names, texts, Tally(**asdict(tally))


def stage(work: Workshop, number: int, names: list[str], texts: list[str], tally: Tally, clean: CleaningSettings) -> tuple[int, Tally]:
    """Normalise a block and put it down, with whatever later steps need to know of each text.

    Returns:
        how many documents it has, and `tally`.
    """
    if clean.normalise:
        texts = [normalised(text) for text in texts]
    overlaps: list[str | None] = [None] * len(texts)
    if clean.near_duplicates is not None or clean.benchmarks is not None:
        overlaps = _compare(work, number, texts, clean)
    _write(work.path("text", number, ".arrow"), names, texts, overlaps)
    write_json(work.path("text", number, ".json"), asdict(tally))  # the last: now the block is whole
    return len(names), tally


def _compare(work: Workshop, number: int, texts: list[str], clean: CleaningSettings) -> list[str | None]:
    """Write the signatures of the texts, and return what each has in common with a benchmark."""
    path = work.folder / BENCHMARKS
    benchmarks = read_benchmarks(path, path.stat().st_mtime_ns) if clean.benchmarks is not None else None
    overlaps, signatures = list[str | None](), list[np.ndarray]()
    for text in texts:
        hashes = word_hashes(found := words(text))
        overlaps.append(benchmarks.overlap(found, hashes) if benchmarks else None)
        if clean.near_duplicates is not None:
            signatures.append(signature(hashes))
    if signatures:
        with whole_file(work.path("signatures", number, ".npy")) as partial, partial.open("wb") as file:
            np.save(file, np.stack(signatures))
    return overlaps


def _write(path: Path, names: list[str], texts: list[str], overlaps: list[str | None]) -> None:
    import pyarrow
    import pyarrow.ipc

    raw = [text.encode() for text in texts]
    columns = {
        "name": pyarrow.array([name.encode("utf-8", "surrogateescape") for name in names], pyarrow.binary()),
        "text": pyarrow.array(raw, pyarrow.large_binary()).cast(pyarrow.large_string()),
        "bytes": pyarrow.array([len(text) for text in raw], pyarrow.int64()),
        "digest": pyarrow.array([digest_of(text) for text in raw], pyarrow.binary(16)),
        "overlap": pyarrow.array(overlaps, pyarrow.string()),
    }
    table = pyarrow.table([columns[name] for name in FIELDS], names=list(FIELDS))
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with whole_file(path) as partial, pyarrow.ipc.new_file(str(partial), table.schema, options=options) as writer:
        writer.write_table(table)


def digest_of(text: bytes) -> bytes:
    """16 bytes that are equal for equal texts."""
    return hashlib.blake2b(text, digest_size=16).digest()


def _name(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
