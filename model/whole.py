"""Whatever exists is complete: a file or a folder is made as `<name>.partial` and takes its name when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL, FORMER = ".partial", ".former.partial"


def partial_of(path: Path) -> Path:
    """Where `path` is made before it takes its name."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield `<path>.partial`, of which the block makes a file or folder; it becomes `path` when the block ends well, else it is removed."""
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

    A folder that is there steps aside first and is removed last: who has its files mapped goes on reading them.
    """
    partial, former = partial_of(path), path.with_name(path.name + FORMER)
    if not partial.is_dir():
        os.replace(partial, path)
        return
    remove(former)
    if path.exists():
        os.rename(path, former)
    os.rename(partial, path)
    remove(former)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one and it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # another process may have made a folder of it by now
            path.unlink()
