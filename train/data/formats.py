"""Texts in files: txt md py, json jsonl, parquet; all but the last also compressed (.gz .zst). A new format is one entry of READERS."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from outgrow.model.base.errors import UserError
from outgrow.train.data.document import Tally

COMPRESSED = (".gz", ".zst")
JSON_BYTES = 2**28  # a .json file is read in one piece; a longer one belongs into lines
ESCAPED = 6  # bytes that JSON may take to spell one


@dataclass(frozen=True)
class Opened:
    """One file, open: what a reader needs to turn it into texts."""

    path: Path
    file: BinaryIO  # decompressed
    column: str
    limit: int  # bytes of one text
    tally: Tally


def _whole(opened: Opened) -> Iterator[tuple[str, str]]:
    raw = opened.file.read(opened.limit + 1)
    if len(raw) > opened.limit:
        opened.tally.too_long_skipped += 1
    else:
        yield "", opened.tally.decode(raw)


def _lines(opened: Opened) -> Iterator[tuple[str, str]]:
    """One JSON object a line; blank lines are none."""
    number, longest = 0, ESCAPED * opened.limit + 2**20
    while line := opened.file.readline(longest):
        number += 1
        if len(line) == longest and not line.endswith(b"\n"):
            opened.tally.too_long_skipped += 1
            while line and not line.endswith(b"\n"):
                line = opened.file.readline(longest)
        elif line.strip():
            place = f"{opened.path}:{number}"
            yield f":{number}", _field(_parsed(opened.tally.decode(line), place), opened.column, place)


def _json(opened: Opened) -> Iterator[tuple[str, str]]:
    """A list of objects, or one; a file of JSON lines under this name is read as what it is."""
    raw = opened.file.read(JSON_BYTES + 1)
    if len(raw) > JSON_BYTES:
        raise UserError(f"{opened.path}: more than {JSON_BYTES:,} bytes of JSON in one piece; write it as .jsonl, one object a line")
    text = opened.tally.decode(raw)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise _not_json(str(opened.path), text, error) from error
        yield from _lines(Opened(opened.path, io.BytesIO(text.encode()), opened.column, opened.limit, opened.tally))
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield f":{number}", _field(item, opened.column, f"{opened.path}:{number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _not_json(place, text, error) from error


def _not_json(place: str, text: str, error: ValueError) -> UserError:
    return UserError(f"{place}: expected a JSON object; found {text[:40]!r} ({error}); mend or remove the line")


def _field(value: Any, column: str, place: str) -> str:
    if not isinstance(value, dict) or column not in value:
        found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{place}: no field {column!r}; found {found or 'none'}; name the field that holds the text: data.column=NAME")
    return text_of(value[column], column, place)


def text_of(value: Any, column: str, place: str) -> str:
    """The text of a column; null is none.

    Raises:
        UserError: it is something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: {column!r} is a {type(value).__name__}, not text; name the column that holds the text: data.column=NAME")
    return value


def _rows(opened: Opened) -> Iterator[tuple[str, str]]:
    """One row a document. The bytes are decoded here, so that broken ones can be counted."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(opened.file) as file:
        _check_column(opened.path, file.schema_arrow, opened.column)
        number = 0
        for part in file.iter_batches(batch_size=256, columns=[opened.column]):
            for raw in part.column(0).cast(pyarrow.large_binary()).to_pylist():
                yield f":{number}", "" if raw is None else opened.tally.decode(raw)
                number += 1


def _check_column(path: Path, schema: Any, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        found = ", ".join(schema.names) or "none"
        raise UserError(f"{path}: no column {column!r}; found {found}; name the one with the text: data.column=NAME")
    kind = schema.field(column).type
    if not any(holds(kind) for holds in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text; name the one with the text: data.column=NAME")


Reader = Callable[[Opened], Iterator[tuple[str, str]]]  # → (place in the file, text)
READERS: dict[str, Reader] = {".txt": _whole, ".md": _whole, ".py": _whole, ".json": _json, ".jsonl": _lines, ".parquet": _rows}


def format_of(path: Path) -> str | None:
    """The key of READERS for this file, compressed or not; None where there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        inner = suffixes[0] if len(suffixes) == 2 else None
        return inner if inner in READERS and inner != ".parquet" else None  # parquet compresses its own pages
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def texts(path: Path, column: str, limit: int, tally: Tally) -> Iterator[tuple[str, str]]:
    """The (place, text) of one file.

    Raises:
        UserError: it cannot be read, ends early, is damaged, or has no such column; the message says which.
    """
    with reading(path) as file:
        yield from READERS[str(format_of(path))](Opened(path, file, column, limit, tally))


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed.

    Raises:
        UserError: it cannot be read, or what is read inside turns out to be damaged or to end early.
    """
    import pyarrow

    what = path.suffix[1:].lower() if path.suffix.lower() in (*COMPRESSED, ".parquet") else ""
    try:
        with _decompressed(path, what) if what in ("gz", "zst") else open(path, "rb") as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        if what and not getattr(error, "errno", None):  # the file's fault, not the system's
            raise UserError(f"{path}: corrupted {what} ({_first_line(error)}); fetch the file again, or remove it") from error
        raise unreadable(path, error) from error


def _decompressed(path: Path, what: str) -> BinaryIO:
    """Arrow's streams tell of a stream that ends early; gzip's and zstandard's own do not all."""
    import pyarrow

    raw = pyarrow.input_stream(str(path), compression={"gz": "gzip", "zst": "zstd"}[what])
    return io.BufferedReader(raw, 2**20)


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that the system does not give."""
    reason = getattr(error, "strerror", None) or _first_line(error)
    return UserError(f"{path}: cannot be read ({reason}); make it readable, or leave it out of data.path")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
