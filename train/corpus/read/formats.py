"""Texts in files: txt md py, json jsonl, csv tsv, parquet; all but the last also compressed (.gz .zst).
READERS takes new formats."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from outgrow.model.base.errors import UserError, first_line, kind_and_line
from outgrow.train.corpus.read.document import MARKS, Tally, is_binary

COMPRESSED = (".gz", ".zst")
JSON_BYTES = 2**28  # a .json file is read in one piece; a longer one belongs into lines
ESCAPED = 6  # bytes that JSON may take to spell one
ROWS = 8  # of a parquet file in memory at a time: a row may have max_document_bytes
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # that obstore opens, S3 of which is tested
DIGITS = 4300  # of a JSON number that is read as one; Python refuses longer ones
WINDOW_BYTES = 2**31  # of a zstd stream, the largest there is (zstd --ultra --long=31)


@dataclass(frozen=True)
class Opened:
    """One file, open: what a reader needs to turn it into texts."""

    path: str
    file: BinaryIO  # decompressed
    column: str
    limit: int  # bytes of one text
    tally: Tally


def _one_text(opened: Opened) -> Iterator[tuple[str, str]]:
    raw = opened.file.read(opened.limit + 1)
    opened.tally.records += 1
    if len(raw) > opened.limit:
        opened.tally.too_long_skipped += 1
        return
    before = opened.tally.utf8_replaced
    if is_binary(text := opened.tally.decode(raw)):
        opened.tally.utf8_replaced = before
        opened.tally.binary_skipped += 1
    else:
        yield "", text


def _lines(opened: Opened) -> Iterator[tuple[str, str]]:
    """One JSON object a line; blank lines are none."""
    number = 0
    longest = ESCAPED * opened.limit + 2**20
    while line := opened.file.readline(longest):
        number += 1
        opened.tally.records += bool(line.strip())
        if len(line) == longest and not line.endswith(b"\n"):
            opened.tally.too_long_skipped += 1
            while line and not line.endswith(b"\n"):
                line = opened.file.readline(longest)
        elif line.strip():
            yield from _counted(opened, number, partial(_line, opened, line))


def _counted(opened: Opened, number: int, value: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """The text of one JSON object, or its fault counted."""
    name = f"{opened.path}:{number}"
    try:
        text = _field(value(name), opened.column, name)
    except UserError as fault:
        opened.tally.skip_broken(fault)
    else:
        yield f":{number}", text


def _json(opened: Opened) -> Iterator[tuple[str, str]]:
    """A list of objects, or one; a file of JSON lines under this name is read as what it is. One that is no
    JSON is a broken record."""
    raw = opened.file.read(JSON_BYTES + 1)
    if len(raw) > JSON_BYTES:
        raise UserError(
            f"{opened.path}: more than {JSON_BYTES:,} bytes of JSON in one piece; write it as .jsonl, one "
            "object a line"
        )
    text = opened.tally.decode(raw)
    if not text.strip():
        opened.tally.records += 1
        yield "", ""
        return
    try:
        value = parse_json(text)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":
            recoded = io.BytesIO(text.encode())
            yield from _lines(replace(opened, file=recoded))
        else:
            opened.tally.records += 1
            opened.tally.skip_broken(_not_json(opened.path, text, error))
        return
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, 1):
        opened.tally.records += 1
        yield from _counted(opened, number, partial(_itself, item))


def parse_json(text: str) -> Any:
    """A JSON value; numbers too long for Python's int are infinite.

    Raises:
        ValueError: it is none, or nested deeper than Python's parser goes.
    """
    try:
        return json.loads(
            text, parse_int=lambda digits: int(digits) if len(digits) < DIGITS else float("inf")
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _line(opened: Opened, line: bytes, location: str) -> Any:
    return _parsed(opened.tally.decode(line), location)


def _itself(item: Any, location: str) -> Any:
    return item


def _parsed(text: str, location: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise _not_json(location, text, error) from error


def _not_json(location: str, text: str, error: ValueError) -> UserError:
    return UserError(
        f"{location}: expected a JSON object; found {text[:40]!r} ({error}); mend or remove the line"
    )


def _field(value: Any, column: str, location: str) -> str:
    is_object = isinstance(value, dict)
    if not is_object or column not in value:
        kind = type(value).__name__
        names = ", ".join(value) if is_object else kind
        raise UserError(
            f"{location}: no field {column!r}; found {names or 'none'}; name the field that holds the text: "
            "data.column=NAME"
        )
    return text_of(value[column], column, location)


def text_of(value: Any, column: str, location: str) -> str:
    """The text of a column; null is none.

    Raises:
        UserError: it is something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{location}: {column!r} is a {type(value).__name__}, not text; name the column that holds the "
            "text: data.column=NAME"
        )
    return value


def _table(delimiter: str) -> Reader:
    """Rows of a table as text, the first of which names the columns."""

    def read(opened: Opened) -> Iterator[tuple[str, str]]:
        longest = ESCAPED * opened.limit + 2**20
        csv.field_size_limit(longest)
        binary = cast(io.BufferedReader, opened.file)
        text = io.TextIOWrapper(binary, "utf-8-sig", errors="replace", newline="")
        rows = csv.DictReader(text, delimiter=delimiter)
        names = list(rows.fieldnames or ())
        if not names:  # an empty file
            opened.tally.records += 1
            yield "", ""
            return
        _check_names(opened.path, names, opened.column)
        try:
            for number, row in enumerate(rows, 1):
                value = row[opened.column] or ""
                opened.tally.records += 1
                opened.tally.utf8_replaced += "\ufffd" in value
                yield f":{number}", value
        except csv.Error as error:
            raise UserError(
                f"{opened.path}: after row {rows.line_num}: no table ({error}); mend it, or leave it out "
                "of data.path"
            ) from error

    return read


def _rows(opened: Opened) -> Iterator[tuple[str, str]]:
    """One row a document. The bytes are decoded here, so that broken ones can be counted."""
    import pyarrow
    import pyarrow.parquet
    from pyarrow import types

    with pyarrow.parquet.ParquetFile(opened.file) as file:
        _check_column(opened.path, file.schema_arrow, opened.column)
        number = 0
        for part in file.iter_batches(batch_size=ROWS, columns=[opened.column]):
            column = part.column(0)
            encoded = types.is_dictionary(column.type)
            plain = column.dictionary_decode() if encoded else column
            for raw in plain.cast(pyarrow.large_binary()).to_pylist():
                opened.tally.records += 1
                text = "" if raw is None else opened.tally.decode(raw)
                yield f":{number}", text
                number += 1


def _check_names(path: str, names: list[str], column: str) -> None:
    if column not in names:
        raise UserError(
            f"{path}: no column {column!r}; found {', '.join(names) or 'none'}; name the one with the "
            "text: data.column=NAME"
        )
    if names.count(column) > 1:
        raise UserError(
            f"{path}: {names.count(column)} columns are called {column!r}; leave one under that name, or "
            "choose another: data.column=NAME"
        )


def _check_column(path: str, schema: Any, column: str) -> None:
    from pyarrow import types

    _check_names(path, schema.names, column)
    kind = schema.field(column).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if str(inner) not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        raise UserError(
            f"{path}: column {column!r} holds {kind}, not text; name the one with the text: data.column=NAME"
        )


Reader = Callable[[Opened], Iterator[tuple[str, str]]]  # → (place in the file, text)
READERS: dict[str, Reader] = {
    ".txt": _one_text,
    ".md": _one_text,
    ".py": _one_text,
    ".json": _json,
    ".jsonl": _lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _rows,
}


def format_of(path: str) -> str | None:
    """The key of READERS for this file, compressed or not; None where there is none."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    if compressed:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else None
    if compressed and suffix == ".parquet":  # which compresses its own pages
        return None
    return suffix if suffix in READERS else None


def texts(path: str, column: str, limit: int, tally: Tally) -> Iterator[tuple[str, str]]:
    """The (place, text) of one file; `path` may be a URL of fsspec.

    Raises:
        UserError: it cannot be read, ends early, is damaged, or has no such column; the message says which.
    """
    kind = str(format_of(path))
    with reading(path) as file:
        file = file if kind == ".parquet" else _in_utf8(file)
        opened = Opened(path, file, column, limit, tally)
        yield from READERS[kind](opened)


def _in_utf8(file: BinaryIO) -> BinaryIO:
    """A file that a mark says to be UTF-16 or UTF-32, recoded; another one as it is."""
    if isinstance(file, io.BufferedReader):
        buffered = file
    else:
        buffered = io.BufferedReader(cast(io.RawIOBase, file), 2**20)
    start = buffered.peek(4)[:4]
    marked = [name for mark, name in MARKS.items() if start.startswith(mark)]
    encoding = marked[0] if marked else "utf-8"
    if encoding in ("utf-8", "utf-8-sig"):
        return buffered
    chunks: Iterable[bytes] = iter(lambda: buffered.read(2**20), b"")
    decoded = codecs.iterdecode(chunks, encoding, errors="replace")
    recoded = _Pieces(piece.encode() for piece in decoded)
    return io.BufferedReader(recoded, 2**20)


class _Pieces(io.RawIOBase):
    """Bytes that come in pieces, as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = piece
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


@contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """Open a file or a URL, decompressed.

    Raises:
        UserError: it cannot be read, or what is read inside turns out to be damaged or to end early.
    """
    import pyarrow

    suffix = PurePosixPath(path).suffix.lower()
    what = suffix[1:] if suffix in (*COMPRESSED, ".parquet") else ""
    try:
        with open_any(path) as raw:
            yield _decompressed(raw, what)
    except _Damaged as error:
        raise UserError(f"{path}: corrupted {what} ({error}); fetch the file again, or remove it") from error
    except (pyarrow.ArrowException, OSError) as error:
        if what and not getattr(error, "errno", None):  # the file's fault, not the system's
            raise UserError(
                f"{path}: corrupted {what} ({first_line(error)}); fetch the file again, or remove it"
            ) from error
        raise unreadable(path, error) from error
    except Exception as error:
        if "://" not in path or isinstance(error, UserError):
            raise
        raise unreadable(path, error) from error  # each store's client raises its own


def open_any(path: str) -> BinaryIO:
    """A local file, or a file behind a URL, open for reading.

    Raises:
        OSError: it cannot be opened, or the store cannot be reached.
    """
    if "://" not in path:
        return open(path, "rb")
    try:
        system, name = store_of(path)
        return cast(BinaryIO, system.open(name, "rb"))
    except (OSError, ImportError):
        raise
    except Exception as error:  # each store's client raises its own
        raise OSError(kind_and_line(error)) from error


def store_of(url: str) -> tuple[Any, str]:
    """The file system of fsspec that a URL lies in, and the path there. Object stores without a client of
    their own are opened by obstore (extra `s3`).

    Raises:
        ImportError: neither is installed.
        ValueError: fsspec knows no such protocol.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import get_filesystem_class

    protocol = url.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ImportError:
        if protocol not in OBJECT_STORES:
            raise
        try:
            from obstore.fsspec import register
        except ImportError as error:
            raise ImportError(f"{protocol}:// needs obstore: pip install -e '.[s3]'") from error
        register(protocol)
    system, path = url_to_fs(url)
    return system, str(path)


class _Damaged(Exception):
    """A stream that is not what its name says."""


def _decompressed(raw: BinaryIO, what: str) -> BinaryIO:
    """Arrow's streams tell of a gzip stream that ends early; gzip's own does not always."""
    import pyarrow

    if what == "gz":
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "gzip")
        return io.BufferedReader(stream, 2**20)
    if what == "zst":
        return io.BufferedReader(_Pieces(_zstd(raw)), 2**20)
    return raw


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Frames of zstd of whatever window, one after another."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
    frame = None
    left = b""
    try:
        while piece := left or raw.read(2**13):
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(piece)
            left = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise _Damaged(first_line(error)) from error
    if frame is not None:
        raise _Damaged("it ends early")


def unreadable(path: str, error: Exception) -> UserError:
    """The error for a file that the system does not give."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"{path}: cannot be read ({reason}); make it readable, or leave it out of data.path")
