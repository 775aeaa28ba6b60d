"""Documents of files: of a folder, a glob, or the standard library."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from outgrow.model.base.errors import UserError
from outgrow.train.data.document import Document, Tally
from outgrow.train.data.formats import READERS, format_of, texts, unreadable
from outgrow.train.data.settings import DataSettings


@dataclass(frozen=True)
class Files:
    """Documents of files, sorted by name. `files` are (name, path), the name relative to the corpus: moving it changes nothing."""

    files: tuple[tuple[str, Path], ...]
    column: str = "text"
    limit: int = 2**24  # bytes of one document

    @property
    def size(self) -> int:
        return sum(_attempt(path, lambda path: path.stat().st_size) for _, path in self.files)

    def documents(self, tally: Tally) -> Iterator[Document]:
        for name, path in self.files[tally.unit :]:
            found = self._from(path, tally)
            for place, text in found:
                tally.item += 1
                yield from tally.document(name + place, text, self.limit)
            tally.unit, tally.item = tally.unit + 1, 0

    def _from(self, path: Path, tally: Tally) -> Iterator[tuple[str, str]]:
        """The texts of one file from the tally's place on; what comes before is read again, but not counted again."""
        counts = asdict(tally)
        found = texts(path, self.column, self.limit, tally)
        for _ in zip(range(tally.item), found, strict=False):
            pass
        for key, value in counts.items():
            setattr(tally, key, value)
        return found

    def stamp(self) -> str:
        return hash_of((name, *_attempt(path, _size_and_time)) for name, path in self.files)

    def digest(self, advance: Callable[[int], None]) -> str:
        return file_digest(self.files, advance)


def file_digest(files: Iterable[tuple[str, Path]], advance: Callable[[int], None] = lambda size: None) -> str:
    """A hash of the names and contents of files; `advance` is told the bytes read for it."""

    def content(path: Path) -> tuple[int, str]:
        advance(size := path.stat().st_size)
        with path.open("rb") as file:
            return size, hashlib.file_digest(file, "sha256").hexdigest()

    return hash_of((name, *_attempt(path, content)) for name, path in files)


def hash_of(parts: Iterable[Any]) -> str:
    """A hash of JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()


def _attempt(path: Path, action: Callable[[Path], Any]) -> Any:
    try:
        return action(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _size_and_time(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def stdlib(settings: DataSettings) -> Files:
    """The running interpreter's own library, without its tests, generated code pages (encodings) and old grammar (lib2to3)."""
    return Files(_stdlib(), limit=settings.max_document_bytes)


def _stdlib() -> tuple[tuple[str, Path], ...]:
    left_out = {"test", "tests", "idlelib", "site-packages", "encodings", "lib2to3"}
    root, found = Path(sysconfig.get_paths()["stdlib"]), list[Path]()
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in left_out]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return named(root, found)


def packages(settings: DataSettings) -> Files:
    """The Python files of installed distributions, without their tests, and the standard library's before them.

    Each is named with its version (`numpy==2.4.6`), so that everyone who installed the same ones has the same text.

    Raises:
        UserError: a distribution is not installed, or in another version; all of them are named.
    """
    found, faults = [(f"stdlib/{name}", path) for name, path in _stdlib()], []
    for requirement in settings.distributions:
        name, _, version = requirement.partition("==")
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            faults.append(f"data.distributions: {name} is not installed; pip install {requirement}")
            continue
        if distribution.version.partition("+")[0] != version:  # 2.13.0+cpu is 2.13.0, built for one kind of machine
            faults.append(f"data.distributions: {requirement} is asked for, {distribution.version} installed; pip install {requirement}")
        found += [(f"{name}/{file.as_posix()}", Path(str(file.locate()))) for file in _modules(distribution)]
    UserError.collect(faults)
    return Files(tuple(sorted(found)), limit=settings.max_document_bytes)


def _modules(distribution: metadata.Distribution) -> list[metadata.PackagePath]:
    """The Python files that a distribution installed inside its packages folder; tests and generated bindings hold little prose."""
    left_out = {"test", "tests", "testing", "_vendor", ".."}
    files = [file for file in distribution.files or () if file.suffix == ".py" and not left_out & set(file.parts)]
    return [file for file in files if Path(str(file.locate())).is_file()]


def files(settings: DataSettings) -> Files:
    """The readable files of a folder (hidden ones apart), of a glob, or one file.

    Raises:
        UserError: there is none.
    """
    root, found = files_of(settings.path or "", "data.path")
    return Files(named(root, found), settings.column, settings.max_document_bytes)


def files_of(path: str, key: str) -> tuple[Path, list[Path]]:
    """The files that READERS can read under a folder, a glob or a name, and the folder that their names are relative to.

    Raises:
        UserError: there is none; the message names the setting `key`.
    """
    expanded = str(Path(path).expanduser())
    root = Path(expanded)
    if glob.has_magic(expanded) and not root.exists():
        fixed = next(i for i, part in enumerate(root.parts) if glob.has_magic(part))
        root, pattern = Path(*root.parts[:fixed]), expanded
    elif root.is_dir():
        pattern = f"{glob.escape(expanded)}/**/*"
    else:
        root, pattern = root.parent, glob.escape(expanded)
    found = [Path(match) for match in glob.iglob(pattern, recursive=True)]
    readable = [file for file in found if format_of(file) and not file.is_dir()]
    if not readable:
        nothing = "it is an empty folder" if Path(expanded).is_dir() else "there is no such file or folder"
        reason = f"none of its {len(found)} files ends in {' '.join(READERS)} (or one of these and .gz .zst)" if found else nothing
        raise UserError(f"{key}={path}: {reason}; give a folder or a glob with text in it")
    return root, readable


def named(root: Path, found: Iterable[Path]) -> tuple[tuple[str, Path], ...]:
    """Files with their names relative to `root`, sorted by these."""
    return tuple(sorted((file.relative_to(root).as_posix(), file) for file in found))
