"""The first step and the last of what one task does with its files: read them, and put their documents down
in the workshop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from datatrove.data import Document
from datatrove.data import DocumentsPipeline as Documents
from datatrove.pipeline.base import PipelineStep

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import whole_file, write_json
from outgrow.train.corpus.read.corpora import Stream, is_full
from outgrow.train.corpus.read.document import Tally
from outgrow.train.corpus.read.files import File, Files, content_of
from outgrow.train.corpus.workshop import BATCH_BYTES, FIELDS, Workshop, plain, tally_of
from outgrow.train.data.settings import DataSettings, read_limit

PIECE_BYTES = 2**24  # of text from a stream, in one file: one task
PIECE_COLUMNS = ("name", "text")


class Read(PipelineStep):
    """The documents of a task's files, up to the limits that are left by the tasks before it, as far as these
    are done."""

    type, name = "📖 - READER", "read"

    def __init__(self, work: Workshop, settings: DataSettings, task: int | None = None) -> None:
        """`task`: the one to read whatever the rank."""
        super().__init__()
        self.work = work
        self.settings = settings
        self.task = task
        self.tally = Tally()
        self.before = Tally()
        self.contents: list[tuple[str, int, str]] = []

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Documents:
        task = rank if self.task is None else self.task
        files = self.work.files(task)
        if limited(self.settings):
            self.before = read_before(self.work, task)
        if is_full(self.settings, self.before):
            return
        self.contents = [content_of(file) for file in files]
        for document in _documents(files, self.settings, self.tally):
            metadata = {"bytes": document.bytes}
            yield Document(document.text, document.name, metadata=metadata)
            if self.full:
                break

    @property
    def full(self) -> bool:
        """Check whether a limit is reached."""
        documents = self.before.documents + self.tally.documents
        size = self.before.bytes + self.tally.bytes
        return is_full(self.settings, Tally(documents=documents, bytes=size))


def read_before(work: Workshop, task: int) -> Tally:
    """Count what the tasks before this one have read, as far as they are done."""
    tally = Tally()
    for done in filter(None, map(work.done, range(task))):
        tally.add(tally_of(done))
    return tally


def limited(settings: DataSettings) -> bool:
    """Check whether a limit may end the reading."""
    return settings.limit_documents is not None or read_limit(settings) is not None


def _documents(files: tuple[File, ...], settings: DataSettings, tally: Tally) -> Iterator[Any]:
    first = files[0] if len(files) == 1 else None
    if first is not None and first.path.endswith(".piece.parquet"):
        return _from_piece(first, settings, tally)
    listed = Files(files, settings.column, settings.max_document_bytes)
    return listed.documents(tally)


# ---- a corpus without files --------------------------------------------------------------------------------


class Fetch(PipelineStep):
    """Write a stream down in pieces, from where an earlier attempt got to. One task."""

    type, name = "📖 - READER", "fetch"

    def __init__(self, folder: Path, settings: DataSettings, stream: Stream) -> None:
        super().__init__()
        self.folder = folder
        self.settings = settings
        self.stream = stream

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:
        number, tally = pieces_there(self.folder)
        names = list[str]()
        texts = list[str]()
        size = 0
        if not is_full(self.settings, tally):
            for document in self.stream.documents(tally):
                names.append(document.name)
                texts.append(document.text)
                size += document.bytes
                full = is_full(self.settings, tally)
                if size >= PIECE_BYTES and not full:
                    _write_piece(self.folder, number, names, texts, tally)
                    number += 1
                    names, texts = [], []
                    size = 0
                if full:
                    break
        tally.check_broken(self.settings.max_broken)
        _write_piece(self.folder, number, names, texts, tally)
        record = {"pieces": number + 1, "tally": plain(tally)}
        write_json(self.folder / "done.json", record)


def pieces_there(folder: Path) -> tuple[int, Tally]:
    """The number of pieces that are there, and how far the reading was after the last of them."""
    number, tally = 0, Tally()
    while (path := folder / f"{number:06d}.json").is_file():
        number = number + 1
        tally = Tally(**json.loads(path.read_text()))
    return number, tally


def _write_piece(folder: Path, number: int, names: list[str], texts: list[str], tally: Tally) -> None:
    import pyarrow
    import pyarrow.parquet

    large_texts = pyarrow.array(texts, pyarrow.large_string())
    table = pyarrow.table([names, large_texts], names=list(PIECE_COLUMNS))
    with whole_file(folder / f"{number:06d}.piece.parquet") as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd")
    record = folder / f"{number:06d}.json"
    write_json(record, plain(tally))


def _from_piece(file: File, settings: DataSettings, tally: Tally) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as piece:
        for batch in piece.iter_batches(batch_size=64):
            columns = [batch.column(key).to_pylist() for key in PIECE_COLUMNS]
            for name, text in zip(*columns, strict=True):
                yield from tally.document(name, text, settings.max_document_bytes)


# ---- putting down ------------------------------------------------------------------------------------------


class PutDown(PipelineStep):
    """Write a task's documents, with what the steps before found out about them, into the workshop; hand none
    on.

    A fault behind a limit may not matter: there it is written down, and told where the reading comes to it.
    """

    type, name = "💽 - WRITER", "put down"

    def __init__(self, work: Workshop, reader: Read, *, signed: bool, compared: bool) -> None:
        super().__init__()
        self.work = work
        self.reader = reader
        self.signed = signed
        self.compared = compared

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:
        reader = self.reader
        task = rank if reader.task is None else reader.task
        if self.work.done(task) is not None:
            return
        fault = None
        try:
            self._write(task, data or iter(()))
        except UserError as error:
            if not limited(reader.settings) or task == 0:
                raise
            fault = str(error)
        before = reader.before
        record = {
            "before": {"documents": before.documents, "bytes": before.bytes},
            "tally": plain(reader.tally),
            "contents": reader.contents,
            "fault": fault,
        }
        write_json(self.work.path("text", task, ".json"), record)  # the last: now the task is done

    def _write(self, task: int, data: Any) -> None:
        overlaps: dict[str, list[Any]] = {"document": [], "ngram": [], "detail": []}
        texts = self.work.path("text", task, ".arrow")
        signatures = self.work.path("signatures", task, ".bin")
        with (
            whole_file(texts) as partial,
            _texts(partial) as put,
            _optional(signatures, self.signed) as out,
        ):
            for number, document in enumerate(data):
                put(document)
                if out is not None:
                    out.write(document.metadata["signature"].tobytes())
                for ngram, detail in document.metadata.get("overlaps", ()):
                    overlaps["document"].append(number)
                    overlaps["ngram"].append(ngram)
                    overlaps["detail"].append(detail)
        if self.compared:
            write_json(self.work.path("overlaps", task, ".json"), overlaps)


@contextmanager
def _optional(path: Path, is_needed: bool) -> Iterator[BinaryIO | None]:
    if not is_needed:
        yield None
        return
    with whole_file(path) as partial, partial.open("wb") as out:
        yield out


@contextmanager
def _texts(path: Path) -> Iterator[Callable[[Document], None]]:
    """Write documents to an Arrow file in batches of some BATCH_BYTES of text."""
    import pyarrow
    import pyarrow.ipc

    kinds = [pyarrow.binary(), pyarrow.large_string(), pyarrow.binary(16), pyarrow.int64()]
    schema = pyarrow.schema(list(zip(FIELDS, kinds, strict=True)))
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    columns: list[list[Any]] = [[] for _ in FIELDS]
    size = 0

    with pyarrow.ipc.new_file(str(path), schema, options=options) as writer:

        def flush() -> None:
            if columns[0]:
                arrays = list(map(pyarrow.array, columns, kinds))
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            for values in columns:
                values.clear()

        def put(document: Document) -> None:
            nonlocal size
            raw = document.text.encode()
            name = document.id.encode("utf-8", "surrogateescape")
            values = (name, document.text, digest_of(raw), len(raw))
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            size += len(raw)
            if size >= BATCH_BYTES:
                flush()
                size = 0

        yield put
        flush()


def digest_of(text: bytes) -> bytes:
    """16 bytes that are equal for equal texts."""
    return hashlib.blake2b(text, digest_size=16).digest()
