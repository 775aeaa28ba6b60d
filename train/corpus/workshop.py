"""The workshop of a build: what each task has done, in files that are whole or absent, so that a kill costs
the tasks at work.

Task i reads its files and puts their documents down as one Arrow file, in batches of some BATCH_BYTES; all
later steps read that. What a task reads is named by its files and settings (its identity), so that after a
change those whose input is the same are not done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from outgrow.train.corpus.read.document import Tally
from outgrow.train.corpus.read.files import File

BATCH_BYTES = 2**20  # of text in memory at a time
FIELDS = ("name", "text", "digest", "bytes")
BY_IDENTITY = ("files", "text", "signatures", "overlaps")  # what depends on a task's own files alone


@dataclass(frozen=True)
class Row:
    """A document that was put down."""

    number: int  # in its task
    name: str
    text: str
    digest: bytes
    bytes: int

    @property
    def document(self) -> Document:
        """The document as a pipeline hands it on."""
        return Document(
            self.text, self.name, metadata={"row": self.number, "bytes": self.bytes, "digest": self.digest}
        )


@dataclass(frozen=True)
class Workshop:
    """`<folder>.partial/work`."""

    folder: Path

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Send a worker the folder alone, not what was read there."""
        return Workshop, (self.folder,)

    def path(self, kind: str, task: int, suffix: str) -> Path:
        by_identity = kind in BY_IDENTITY
        name = self.tasks[task] if by_identity else f"{task:06d}"
        return self.folder / kind / f"{name}{suffix}"

    @property
    def plan(self) -> Path:
        """The record of what is built."""
        return self.folder / "plan.json"

    @property
    def stages(self) -> Path:
        """The folder of the executors' records: tasks done, statistics, logs."""
        return self.folder / "stages"

    @property
    def fetched(self) -> Path:
        """A stream, written down as files."""
        return self.folder / "fetched"

    @cached_property
    def tasks(self) -> list[str]:
        """The identity of each task."""
        return list(json.loads(self.plan.read_text())["tasks"])

    def files(self, task: int) -> tuple[File, ...]:
        entries = json.loads(self.path("files", task, ".json").read_text())
        return tuple(File(*entry) for entry in entries)

    # ---- what was read -------------------------------------------------------------------------------------

    @property
    def read(self) -> Path:
        """Written when all is read."""
        return self.folder / "read.json"

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of each task's documents; known when all are read. Tasks behind a limit have none."""
        return tuple(json.loads(self.read.read_text())["counts"])

    @cached_property
    def tally(self) -> Tally:
        return Tally(**json.loads(self.read.read_text())["tally"])

    @cached_property
    def starts(self) -> list[int]:
        """The number of each task's first document among all."""
        return [0, *np.cumsum(self.counts, dtype=np.int64).tolist()]

    def done(self, task: int) -> dict[str, Any] | None:
        """The record of a task's reading; None where it is not done."""
        path = self.path("text", task, ".json")
        return json.loads(path.read_text()) if path.is_file() else None

    def rows(self, task: int) -> Iterator[Row]:
        """The documents of a task, a batch in memory at a time."""
        number = 0
        for batch in self._batches(task, FIELDS):
            columns = [batch.column(field).to_pylist() for field in FIELDS]
            for values in zip(*columns, strict=True):
                yield Row(number, spelt(values[0]), *values[1:])
                number += 1

    def names(self, task: int) -> list[str]:
        columns = self._columns(task, "name")
        names = chain.from_iterable(column.to_pylist() for column in columns)
        return list(map(spelt, names))

    def sizes(self, task: int) -> np.ndarray:
        """Bytes of each text in UTF-8, int64 (documents,)."""
        parts = [column.to_numpy() for column in self._columns(task, "bytes")]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def digests(self, task: int) -> np.ndarray:
        """The digest of each text: two uint64, (documents, 2)."""
        parts = [np.empty(0, "<u8")]
        for column in self._columns(task, "digest"):
            _, data = column.buffers()
            parts.append(np.frombuffer(data, "<u8", 2 * len(column)))
        halves = np.concatenate(parts)
        return halves.reshape(-1, 2)

    def signatures(self, task: int, width: int) -> np.ndarray:
        """MinHash values, mapped: uint32 (documents, width)."""
        path = self.path("signatures", task, ".bin")
        return (
            np.memmap(path, "<u4", "r").reshape(-1, width)
            if path.stat().st_size
            else np.empty((0, width), "<u4")
        )

    def overlaps(self, task: int) -> dict[str, list[Any]]:
        """Passages that the texts share with benchmarks: columns document, ngram, detail."""
        path = self.path("overlaps", task, ".json")
        return (
            dict(json.loads(path.read_text()))
            if path.is_file()
            else {"document": [], "ngram": [], "detail": []}
        )

    def _columns(self, task: int, name: str) -> Iterator[Any]:
        """One field of a task's documents, batch by batch."""
        return (batch.column(name) for batch in self._batches(task, (name,)))

    def _batches(self, task: int, names: tuple[str, ...]) -> Iterator[Any]:
        import pyarrow.ipc

        options = pyarrow.ipc.IpcReadOptions(
            included_fields=[FIELDS.index(name) for name in names], use_threads=False
        )
        with pyarrow.memory_map(str(self.path("text", task, ".arrow"))) as file:
            batches = pyarrow.ipc.open_file(file, options=options)
            yield from (batches.get_batch(i) for i in range(batches.num_record_batches))


def spelt(raw: bytes) -> str:
    """A name, which may hold bytes that are no UTF-8."""
    return raw.decode("utf-8", "surrogateescape")


def tally_of(done: dict[str, Any]) -> Tally:
    """The tally in what a task says."""
    return Tally(**done["tally"])


def plain(tally: Tally) -> dict[str, Any]:
    """A tally as JSON."""
    return asdict(tally)
