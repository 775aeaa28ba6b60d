"""Where documents come from. A corpus streams them in a fixed order and can say, without reading them twice, whether it has changed.

A new file format is one entry of READERS, a new kind of corpus one entry of CORPORA.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from model.errors import UserError
from train.data.settings import DataSettings


class Document(NamedTuple):
    """One text of a corpus."""

    name: str  # unique in the corpus; decides the split
    text: str
    bytes: int  # of the text in UTF-8


@dataclass
class Tally:
    """What was not taken as it stood; it ends up in the manifest."""

    empty_skipped: int = 0
    utf8_replaced: int = 0  # documents in which broken UTF-8 became U+FFFD

    def decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.utf8_replaced += 1
            return raw.decode(errors="replace")

    def document(self, name: str, text: str) -> Iterator[Document]:
        """`text` as a document; nothing, but counted, where it is empty."""
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
            raw = text.encode(errors="replace")
            text, self.utf8_replaced = raw.decode(), self.utf8_replaced + 1
        if not text.strip():
            self.empty_skipped += 1
            return
        yield Document(name, text, len(raw))


class Corpus(Protocol):
    """A stream of documents that knows its size and how to tell that it changed."""

    @property
    def size(self) -> int | None:
        """Bytes to read, where that is known."""

    def documents(self, tally: Tally) -> Iterator[Document]:
        """Every document, in a fixed order. Raises UserError for what cannot be read."""

    def stamp(self) -> str:
        """A hash that is cheap and may change without need; when it is the same, nothing has changed."""

    def digest(self, advance: Callable[[int], None]) -> str:
        """A hash that changes if and only if a document may have changed; `advance` is told the bytes read for it."""


def open_corpus(settings: DataSettings) -> Corpus:
    """The corpus that `settings` name; nothing is read yet.

    Raises:
        UserError: there is no such file.
    """
    return CORPORA[settings.corpus](settings)


def documents(settings: DataSettings, corpus: Corpus, tally: Tally | None = None) -> Iterator[Document]:
    """The documents of `corpus` up to the limit."""
    return islice(corpus.documents(tally or Tally()), settings.limit_documents)


def is_validation(name: str, settings: DataSettings) -> bool:
    """Whether the document of this name is held out: a keyed hash, so no other document and no order plays a part."""
    key = f"validation {settings.seed}".encode()
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < settings.validation_fraction * 2**64


# ---- files ----------------------------------------------------------------------------------------------------------------------------


def _whole(path: Path, column: str, tally: Tally) -> Iterator[tuple[str, str]]:
    yield "", tally.decode(path.read_bytes())


def _lines(path: Path, column: str, tally: Tally) -> Iterator[tuple[str, str]]:
    """One JSON object a line; blank lines are none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f":{number}", _field(line, column, f"{path}:{number}", tally)


def _field(line: bytes, column: str, place: str, tally: Tally) -> str:
    try:
        value = json.loads(tally.decode(line))
    except ValueError as error:
        raise UserError(f"{place}: expected a JSON object; found {line[:40]!r} ({error}); mend or remove the line") from error
    if not isinstance(value, dict) or column not in value:
        found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{place}: no field {column!r}; found {found or 'none'}; name the field that holds the text: data.column=NAME")
    return _text(value[column], column, place)


def _text(value: Any, column: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: {column!r} is a {type(value).__name__}, not text; name the column that holds the text: data.column=NAME")
    return value


def _rows(path: Path, column: str, tally: Tally) -> Iterator[tuple[str, str]]:
    """One row a document. The bytes are decoded here, so that broken ones can be counted."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column)
            number = 0
            for part in file.iter_batches(batch_size=1024, columns=[column]):
                for raw in part.column(0).cast(pyarrow.large_binary()).to_pylist():
                    yield f":{number}", "" if raw is None else tally.decode(raw)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the system's fault, not the file's
            raise
        raise UserError(f"{path}: corrupted parquet ({_first_line(error)}); fetch the file again, or remove it") from error


def _check_column(path: Path, schema: Any, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        found = ", ".join(schema.names) or "none"
        raise UserError(f"{path}: no column {column!r}; found {found}; name the one with the text: data.column=NAME")
    kind = schema.field(column).type
    if not any(holds(kind) for holds in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text; name the one with the text: data.column=NAME")


Reader = Callable[[Path, str, Tally], Iterator[tuple[str, str]]]  # → (place in the file, text)
READERS: dict[str, Reader] = {".txt": _whole, ".md": _whole, ".py": _whole, ".jsonl": _lines, ".parquet": _rows}


@dataclass(frozen=True)
class Files:
    """Documents of files, sorted by name. `files` are (name, path), the name relative to the corpus: moving it changes nothing."""

    files: tuple[tuple[str, Path], ...]
    column: str = "text"

    @property
    def size(self) -> int:
        return sum(_attempt(path, lambda path: path.stat().st_size) for _, path in self.files)

    def documents(self, tally: Tally) -> Iterator[Document]:
        for name, path in self.files:
            texts = READERS[path.suffix.lower()](path, self.column, tally)
            while (found := _attempt(path, lambda _, texts=texts: next(texts, None))) is not None:  # type: ignore[misc]
                yield from tally.document(name + found[0], found[1])

    def stamp(self) -> str:
        return _hash((name, *_attempt(path, _size_and_time)) for name, path in self.files)

    def digest(self, advance: Callable[[int], None]) -> str:
        def content(path: Path) -> tuple[int, str]:
            advance(size := path.stat().st_size)
            with path.open("rb") as file:
                return size, hashlib.file_digest(file, "sha256").hexdigest()

        return _hash((name, *_attempt(path, content)) for name, path in self.files)


def _attempt(path: Path, action: Callable[[Path], Any]) -> Any:
    try:
        return action(path)
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); make it readable, or leave it out of data.path") from error


def _size_and_time(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _stdlib(settings: DataSettings) -> Files:
    """The running interpreter's own library, without its tests, generated code pages (encodings) and old grammar (lib2to3)."""
    left_out = {"test", "tests", "idlelib", "site-packages", "encodings", "lib2to3"}
    root, files = Path(sysconfig.get_paths()["stdlib"]), list[Path]()
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in left_out]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return Files(_named(root, files))


def _files(settings: DataSettings) -> Files:
    """The readable files of a folder (hidden ones apart), of a glob, or one file."""
    path = str(Path(settings.path or "").expanduser())
    root = Path(path)
    if glob.has_magic(path) and not root.exists():
        fixed = next(i for i, part in enumerate(root.parts) if glob.has_magic(part))
        root, pattern = Path(*root.parts[:fixed]), path
    elif root.is_dir():
        pattern = f"{glob.escape(path)}/**/*"
    else:
        root, pattern = root.parent, glob.escape(path)
    found = [Path(match) for match in glob.iglob(pattern, recursive=True)]
    files = [file for file in found if file.suffix.lower() in READERS and not file.is_dir()]
    if not files:
        nothing = "it is an empty folder" if Path(path).is_dir() else "there is no such file or folder"
        reason = f"none of its {len(found)} files ends in {' '.join(READERS)}" if found else nothing
        raise UserError(f"data.path={settings.path}: {reason}; give a folder or a glob with text in it")
    return Files(_named(root, files), settings.column)


def _named(root: Path, files: Iterable[Path]) -> tuple[tuple[str, Path], ...]:
    return tuple(sorted((file.relative_to(root).as_posix(), file) for file in files))


# ---- hub ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hub:
    """Documents of a Hugging Face dataset. It is what its name and revision say: once the tokens are there, no network is needed."""

    settings: DataSettings
    size: None = None

    def documents(self, tally: Tally) -> Iterator[Document]:
        column = self.settings.column
        for number, row in enumerate(self._rows()):
            place = f"{self.settings.dataset}:{self.settings.split}:{number}"
            if column not in row:
                found = ", ".join(row) or "none"
                raise UserError(f"{place}: no column {column!r}; found {found}; name the one with the text: data.column=NAME")
            yield from tally.document(place, _text(row[column], column, place))

    def _rows(self) -> Iterator[dict[str, Any]]:
        wanted = self.settings
        try:
            from datasets import load_dataset

            yield from load_dataset(wanted.dataset, wanted.config, split=wanted.split, revision=wanted.revision, streaming=wanted.streaming)
        except Exception as error:  # datasets, fsspec, pyarrow, httpx and the hub's client each raise their own
            named = " ".join(f"{key}={getattr(wanted, key)}" for key in ("dataset", "config", "split", "revision") if getattr(wanted, key))
            raise UserError(
                f"cannot read {named} from the Hugging Face hub ({type(error).__name__}: {_first_line(error)}); check the names and "
                "the network, log in with `hf auth login` where it is gated, or read files of your own with data=files data.path=FOLDER"
            ) from error

    def stamp(self) -> str:
        return _hash([asdict(self.settings)[key] for key in ("dataset", "config", "split", "revision")])

    def digest(self, advance: Callable[[int], None]) -> str:
        return self.stamp()


CORPORA: dict[str, Callable[[DataSettings], Corpus]] = {"stdlib": _stdlib, "files": _files, "hub": Hub}


def _hash(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
