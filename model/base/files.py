"""Writing files and folders that are whole or absent, and telling of disks in one way."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outgrow.model.base.atomic import make_whole, remove
from outgrow.model.base.errors import UserError, first_line
from outgrow.model.base.locks import Lock

# of libraries
_SIGNS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed",
    "iostream error",
)
_IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM}
_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOENT,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    *_IN_THE_WAY,
    *_NOT_ALLOWED,
}


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield `<folder>.partial`, empty; it becomes `folder`, on the disk, when the block ends well, else it is
    removed.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    with telling_disk_faults(folder):
        with make_whole(folder) as partial:
            remove(partial)
            partial.mkdir(exist_ok=True)
            yield partial
            for path in (*partial.rglob("*"), partial):
                _flush(path)
        _flush(folder.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield `<path>.partial` to write to; it becomes `path`, on the disk, when the block ends well, else it
    is removed.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    with telling_disk_faults(path), make_whole(path) as partial:
        yield partial
        _flush(partial)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process make `folder` in the block, while others that come wait their turn; the lock lies
    beside it.

    Who waits long says for whom; of several processes of one run, process 0.

    Raises:
        UserError: the disk is full or not writable.
    """

    def tell(holder: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"{folder}: is being made right now; waiting for {holder}", file=sys.stderr)

    with telling_disk_faults(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.with_name(folder.name + ".lock"))
    with lock:
        with telling_disk_faults(folder):
            lock.wait(tell)
            lock.sign()
        yield


def write_text(path: Path, text: str) -> None:
    """`text` as the file `path`, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """`value` as an indented JSON file, whole or not at all."""
    text = json.dumps(plain_json(value), indent=2, allow_nan=False)
    write_text(path, text + "\n")


def plain_json(value: Any) -> Any:
    """`value` with null for each number that is not finite: JSON has no NaN, and strict readers refuse the
    whole file for one.
    """
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    is_float = isinstance(value, float)
    return None if is_float and not math.isfinite(value) else value


def read_object(path: Path, way_out: str) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        UserError: it cannot be read or is no object; the message ends with `way_out`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {way_out}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{path}: expected a JSON object, found {kind}; {way_out}")
    return value


@contextmanager
def telling_disk_faults(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk, in whatever way a library reports it, into one UserError that names
    `path`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_disk_fault(error):
            raise
        raise UserError(
            f"{path}: could not be written ({_reason(error)}); whatever was complete before is untouched: "
            f"{_remedy(error)}, or write elsewhere, and start the same command again"
        ) from error


def _is_disk_fault(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK
    text = str(error)
    return any(sign in text for sign in _SIGNS)


def _remedy(error: BaseException) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in _IN_THE_WAY:
        return "move what lies in its place away"
    if number in _NOT_ALLOWED:
        return "allow it"
    return "free space"


def _reason(error: BaseException) -> str:
    words = error.strerror if isinstance(error, OSError) else None
    return words or first_line(error)


def _flush(path: Path) -> None:
    """Ask the operating system to put `path` on the disk; file systems that cannot are left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _DISK:
            raise
    finally:
        os.close(descriptor)
