"""Whatever exists is complete: a file or a folder is made as `<name>.partial` and takes its name when it is
whole.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL, FORMER = ".partial", ".former.partial"


def partial_of(path: Path) -> Path:
    """Name the place where `path` is made before it takes its name."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def make_whole(path: Path) -> Iterator[Path]:
    """Yield `<path>.partial`, of which the block makes a file or folder; it becomes `path` when the block
    ends well, else it is removed.
    """
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        take_place(path)
    except BaseException:
        remove(partial)
        raise


def take_place(path: Path) -> None:
    """Rename `<path>.partial` to `path`.

    A folder that is there changes places with it in one step, so that at every moment there is one of the
    two, and is removed last: who has its files mapped goes on reading them. Where the system cannot do that
    in one step, it steps aside first.
    """
    partial = partial_of(path)
    former = path.with_name(path.name + FORMER)
    if not partial.is_dir():
        os.replace(partial, path)
        return
    remove(former)
    if path.exists() and exchange(partial, path):
        os.rename(partial, former)
    else:
        if path.exists():
            os.rename(path, former)
        os.rename(partial, path)
    remove(former)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot (Linux's
    renameat2 can).
    """
    rename: Any = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None:
        return False
    first = os.fsencode(one)
    second = os.fsencode(other)
    status = rename(here, first, here, second, exchange)
    return bool(status == 0)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one and it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # another process may have made a folder of it by now
            path.unlink()
