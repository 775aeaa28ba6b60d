"""Documents of files: of a folder, a glob, a URL that fsspec opens, the standard library, or installed
packages."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from outgrow.model.base.atomic import PARTIAL
from outgrow.model.base.errors import UserError, kind_and_line, seen_from
from outgrow.train.corpus.read.document import Document, Tally
from outgrow.train.corpus.read.formats import READERS, format_of, open_any, store_of, texts, unreadable
from outgrow.train.data.settings import DataSettings
from outgrow.train.data.shards import MANIFEST, TOKENIZER

TASK_BYTES = 2**20  # of files, read by one task at least,
# and as much more as it takes to have no more tasks than these: each leaves some files, opened together
MOST_TASKS = 1024
TOLD = 5  # of paths that are left out, named one by one


@dataclass(frozen=True)
class File:
    """A file of a corpus: its name relative to the corpus (moving that changes nothing), where it lies, and
    what tells that it changed."""

    name: str
    path: str  # a path, or a URL
    size: int
    version: str | int  # the time of its last change, or what a store says of its content


@dataclass(frozen=True)
class Files:
    """Documents of files, sorted by name."""

    files: tuple[File, ...]
    column: str = "text"
    limit: int = 2**24  # bytes of one document

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def tasks(self) -> list[tuple[File, ...]]:
        """The files dealt to tasks, in order: a function of the files alone, so that no number of workers can
        change a byte."""
        least_bytes = max(TASK_BYTES, self.size / MOST_TASKS)
        size = 0
        tasks: list[list[File]] = []
        for file in self.files:
            if not tasks or size >= least_bytes:
                tasks.append([])
                size = 0
            tasks[-1].append(file)
            size += file.size
        return [tuple(task) for task in tasks]

    def documents(self, tally: Tally) -> Iterator[Document]:
        """The documents of all files.

        Raises:
            UserError: a file cannot be read. Records that cannot are counted.
        """
        for file in self.files:
            records = texts(file.path, self.column, self.limit, tally)
            for name, text in records:
                whole_name = file.name + name
                yield from tally.document(whole_name, text, self.limit)

    def stamp(self) -> str:
        """A hash that is cheap and may change without need; when it is the same, nothing has changed."""
        stamps = ((file.name, file.size, file.version) for file in self.files)
        return hash_of(stamps)


def content_of(file: File) -> tuple[str, int, str]:
    """Name, size and hash of a file's content; behind a URL, what the store says of it.

    Raises:
        UserError: it cannot be read.
    """
    if "://" in file.path:
        return file.name, file.size, str(file.version)
    try:
        with open_any(file.path) as opened:
            digest = hashlib.file_digest(opened, "sha256")  # type: ignore[arg-type]
            return file.name, file.size, digest.hexdigest()
    except OSError as error:
        raise unreadable(file.path, error) from error


def hash_of(parts: Iterable[Any]) -> str:
    """A hash of JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()


# ---- which files -------------------------------------------------------------------------------------------


def files(settings: DataSettings) -> Files:
    """The readable files of a folder (hidden ones apart), of a glob, one file, or what a URL says.

    Raises:
        UserError: there is none.
    """
    readable = files_of(settings.path or "", "data.path")
    return Files(readable, settings.column, settings.max_document_bytes)


def files_of(path: str, key: str) -> tuple[File, ...]:
    """The files that READERS can read under a folder, a glob, a name or a URL, sorted by their names relative
    to it.

    Args:
        key: the setting that names it, for messages.

    Raises:
        UserError: there is none, or a store cannot be reached.
    """
    if "://" in path:
        return _remote(path, key)
    expanded = os.path.expanduser(path)
    root = Path(expanded)
    pattern = re.compile(".*", re.DOTALL)
    if glob.has_magic(expanded) and not root.exists():
        magic = [glob.has_magic(part) for part in root.parts]
        fixed = magic.index(True)
        pattern = _pattern(path, key, root.parts[fixed:])
        root = Path(*root.parts[:fixed])
    listed = [str(root)] if root.is_file() else []
    root = root.parent if listed else root
    left_out = list[str]()
    matching = listed or [
        file for file in _walk(str(root), left_out) if pattern.fullmatch(os.path.relpath(file, root))
    ]
    readable = [file for file in matching if format_of(file)]
    _tell(key, left_out)
    if not readable:
        raise UserError(_nothing(path, key, expanded, len(matching)))
    return _by_name(_local(root, file) for file in readable)


def _nothing(path: str, key: str, expanded: str, count: int) -> str:
    missing = f"there is no such file or folder{seen_from(Path(expanded))}"
    nothing = "it is an empty folder" if os.path.isdir(expanded) else missing
    reason = (
        f"none of its {count} files ends in {' '.join(READERS)} (or one of these and .gz .zst)"
        if count
        else nothing
    )
    return f"{key}={path}: {reason}; give a folder or a glob with text in it"


def _pattern(path: str, key: str, parts: tuple[str, ...]) -> re.Pattern[str]:
    """A glob as a regular expression on paths, as fsspec reads those of URLs: ** crosses folders.

    Raises:
        UserError: it is none.
    """
    from fsspec.utils import glob_translate

    try:
        return re.compile(glob_translate("/".join(parts)))
    except (ValueError, re.error) as error:
        raise UserError(f"{key}={path}: no glob ({error}); give one such as texts/**/*.md") from error


def _walk(root: str, left_out: list[str]) -> Iterator[str]:
    """Every file under a folder, hidden ones and prepared tokens apart. A link to a folder elsewhere is
    followed, once; to one inside or above, never."""
    inside = os.path.realpath(root)
    seen = {inside}

    def unlisted(error: OSError) -> None:
        if error.filename == root and isinstance(error, FileNotFoundError):
            return  # that there is nothing at all is told by whoever asks
        left_out.append(f"{error.filename}: cannot be listed ({error.strerror})")

    for folder, inner, names in os.walk(root, onerror=unlisted, followlinks=True):
        inner.sort()
        folders = [name for name in inner if not name.startswith(".")]
        passed = [_passed(folder, name, inside, seen, left_out) for name in folders]
        inner[:] = [name for name, over in zip(folders, passed, strict=True) if not over]
        for name in names:
            if name.startswith("."):
                continue
            path = os.path.join(folder, name)
            if os.path.exists(path) and not os.path.isfile(path):
                left_out.append(f"{path}: neither a file nor a folder ({_kind(path)})")
            else:
                yield path


def _passed(folder: str, name: str, inside: str, seen: set[str], left_out: list[str]) -> bool:
    """Check for a folder that is passed over; then it is listed in `left_out`."""
    path = os.path.join(folder, name)
    real = os.path.realpath(path)
    if _is_prepared(path):
        left_out.append(f"{path}: prepared tokens, or a build of them")
        return True
    leads_back = os.path.islink(path) and _overlap(inside, real)
    if real in seen or leads_back:
        left_out.append(f"{path}: a link to a folder that is read already")
        return True
    seen.add(real)
    return False


def _is_prepared(folder: str) -> bool:
    """Check for what `prepare` writes, of this text or another: `data.path=.` holds all of it."""
    if folder.endswith(PARTIAL):
        return True
    manifest = os.path.join(folder, MANIFEST)
    tokenizer = os.path.join(folder, TOKENIZER)
    return os.path.isfile(manifest) and os.path.isdir(tokenizer)


def _overlap(one: str, other: str) -> bool:
    """Check whether one of two folders is, or is in, the other."""
    return _holds(one, other) or _holds(other, one)


def _holds(outer: str, inner: str) -> bool:
    stem = outer.rstrip(os.sep)
    return inner == outer or inner.startswith(f"{stem}{os.sep}")


def _kind(path: str) -> str:
    mode = os.stat(path).st_mode
    kinds = {
        "a FIFO": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    for name, holds in kinds.items():
        if holds(mode):
            return name
    return "of another kind"


def _tell(key: str, left_out: list[str]) -> None:
    for line in left_out[:TOLD]:
        print(f"{key}: left out {line}", file=sys.stderr)
    more = len(left_out) - TOLD
    if more > 0:
        print(f"{key}: left out {more} more", file=sys.stderr)


def _local(root: Path, path: str) -> File:
    relative = Path(os.path.relpath(path, root))
    return _file(relative.as_posix(), path)


def _file(name: str, path: str) -> File:
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return File(name, path, status.st_size, status.st_mtime_ns)


def _remote(url: str, key: str) -> tuple[File, ...]:
    """The files behind a URL: one, those of a folder, or those of a glob."""
    try:
        system, path = store_of(url)
        if glob.has_magic(path):
            literal = re.split(r"[*?\[]", path, maxsplit=1)[0]
            root = literal[: literal.rindex("/") + 1]
            entries = system.glob(path, detail=True)
        elif format_of(path):
            root = path[: path.rindex("/") + 1]
            entries = {path: system.info(path)}
        else:
            root = path.rstrip("/") + "/"
            entries = _of_folder(system.find(root, detail=True), root, key)
    except Exception as error:  # each store's client raises its own
        raise UserError(
            f"{key}={url}: cannot be listed ({kind_and_line(error)}); check the "
            "address, the network and your rights"
        ) from error
    remote = []
    for name, info in entries.items():
        if info.get("type") == "directory" or not format_of(name):
            continue
        address = name if "://" in name else system.unstrip_protocol(name)
        size = int(info.get("size") or 0)
        relative = name.removeprefix(root)
        remote.append(File(relative, address, size, _version(info)))
    if not remote:
        raise UserError(
            f"{key}={url}: none of its {len(entries)} files ends in {' '.join(READERS)}; give a folder or a "
            "glob with text in it"
        )
    return _by_name(remote)


def _of_folder(entries: dict[str, Any], root: str, key: str) -> dict[str, Any]:
    """Choose what a store lists under `root`, hidden files and prepared tokens apart, as in a folder here."""
    relative = {name: PurePosixPath(name.removeprefix(root)) for name in entries}
    paths = relative.values()
    tokenizers = {path.parent.parent for path in paths if path.parent.name == TOKENIZER}
    manifests = {path.parent for path in paths if path.name == MANIFEST}
    prepared = tokenizers & manifests - {PurePosixPath()}
    folders = chain.from_iterable(path.parents for path in paths)
    prepared |= {folder for folder in folders if folder.name.endswith(PARTIAL)}
    _tell(key, [f"{root}{folder}: prepared tokens, or a build of them" for folder in sorted(prepared)])
    survivors = {}
    for name, path in relative.items():
        is_hidden = any(part.startswith(".") for part in path.parts)
        if not is_hidden and prepared.isdisjoint(path.parents):
            survivors[name] = entries[name]
    return survivors


def _by_name(listed: Iterable[File]) -> tuple[File, ...]:
    return tuple(sorted(listed, key=lambda file: file.name))


def _version(info: dict[str, Any]) -> str:
    """Tell what a store says of a file's content: its checksum, or the time of its last change."""
    marks = (
        "ETag",
        "etag",
        "e_tag",
        "md5",
        "md5Hash",
        "crc32c",
        "sha256",
        "blob_id",
        "xet_hash",
        "LastModified",
        "mtime",
        "updated",
        "last_modified",
    )
    for key in marks:
        if info.get(key):
            return f"{key} {info[key]}"
    return ""


# ---- Python on this machine --------------------------------------------------------------------------------


def stdlib(settings: DataSettings) -> Files:
    """The running interpreter's own library, without its tests, generated code pages (encodings) and old
    grammar (lib2to3)."""
    return Files(_stdlib(""), limit=settings.max_document_bytes)


def _stdlib(prefix: str) -> tuple[File, ...]:
    left_out = {"test", "tests", "idlelib", "site-packages", "encodings", "lib2to3"}
    root = Path(sysconfig.get_paths()["stdlib"])
    listed = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in left_out]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                relative = path.relative_to(root).as_posix()
                own_name = prefix + relative
                listed.append(_file(own_name, str(path)))
    return _by_name(listed)


def packages(settings: DataSettings) -> Files:
    """The Python files of installed distributions, without their tests, and the standard library's before
    them.

    Each is named with its version (`numpy==2.4.6`), so that everyone who installed the same ones has the same
    text.

    Raises:
        UserError: a distribution is not installed, or in another version; all of them are named.
    """
    sources = list(_stdlib("stdlib/"))
    faults = []
    for requirement in settings.distributions:
        name, _, version = requirement.partition("==")
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            faults.append(f"data.distributions: {name} is not installed; pip install {requirement}")
            continue
        installed = distribution.version
        # 2.13.0+cpu is 2.13.0, built for one kind of machine
        if installed.partition("+")[0] != version:
            faults.append(
                f"data.distributions: {requirement} is asked for, {installed} installed; pip "
                f"install {requirement}"
            )
        for module in _modules(distribution):
            listed = f"{name}/{module.as_posix()}"
            sources.append(_file(listed, str(module.locate())))
    UserError.collect(faults)
    return Files(_by_name(sources), limit=settings.max_document_bytes)


def _modules(distribution: metadata.Distribution) -> list[metadata.PackagePath]:
    """The Python files that a distribution installed inside its packages folder; tests and generated bindings
    hold little prose."""
    left_out = {"test", "tests", "testing", "_vendor", ".."}
    modules = []
    for file in distribution.files or ():
        is_code = file.suffix == ".py" and left_out.isdisjoint(file.parts)
        if is_code and Path(str(file.locate())).is_file():
            modules.append(file)
    return modules
