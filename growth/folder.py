"""The place of a result: made as `<out>.partial`, then renamed to `out`. Nothing is cleared or replaced there
that growth did not make.

`growth.json` lists the files of a finished folder with a fingerprint of each, so that one which was trained
on or edited in its place is told from growth's; what is being written carries a mark, so that everything in
it may be cleared.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from outgrow.model.base.atomic import FORMER, exchange, partial_of
from outgrow.model.base.errors import UserError, names_of
from outgrow.model.base.locks import Lock
from outgrow.model.config import read_json

RECIPE = "growth.json"  # the record of a finished growth; its `files` are what growth made
MARK = "growth.partial.json"  # in a folder that growth is filling; workers keep there what they agree on
WORKER = "worker-"  # begins the name of a file that a worker holds while it is at work
STRETCHES, STRETCH = 64, 4096  # of a file that its fingerprint reads, and their bytes
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True)
class Place:
    """The folders that a growth is written to.

    Attributes:
        out: the folder to make.
        overwrite: whether an `out` that growth made may be replaced.
        reads: files and folders that the growth reads, which must not be replaced.
    """

    out: Path
    overwrite: bool = False
    reads: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.out.name in ("", "..") or "\0" in str(self.out):
            raise UserError(f"out {str(self.out)!r}: names no folder; give out=DIR")

    @property
    def partial(self) -> Path:
        return partial_of(self.out)

    @property
    def former(self) -> Path:
        """The folder to which an `out` that is replaced steps aside."""
        return self.out.with_name(self.out.name + FORMER)

    def check(self) -> None:
        """Look whether `out` can be made without destroying anything; what a killed replacement left over is
        removed.

        Raises:
            UserError: `out` exists and may not be replaced, holds or is what is read, or something that
                growth did not make is in the way.
        """
        with disk_faults(self.out):
            self._check_reads()
            if _exists(self.former) and self.out.exists():
                self._remove_former()
            self._check_out()
            self._check_partial()
            if not self.overwrite or not _exists(self.former):
                return
            if others := strangers(self.former):
                raise UserError(
                    f"out: {self.former} is in the way and holds {_few(others)}, which growth did not "
                    "make; move it away"
                )

    def _check_reads(self) -> None:
        for folder in (self.out, self.partial, self.former):
            for path in self.reads:
                if _holds(folder, path):
                    raise UserError(
                        f"out {self.out}: {folder} is or holds {path}, which is read for this growth; "
                        "choose another folder"
                    )

    def _check_out(self) -> None:
        out = self.out
        if not _exists(out):
            return
        if not self.overwrite:
            raise UserError(
                f"out {out}: exists already; choose another folder, or overwrite=true to replace it once "
                "the new one is complete"
            )
        is_folder = out.is_dir()
        others = strangers(out) if is_folder else []
        has_config = (out / "config.json").exists()
        is_checkpoint = is_folder and (has_config or not others)
        if not is_checkpoint:
            raise UserError(
                f"out {out}: exists and is no checkpoint folder, so it is not replaced; choose another folder"
            )
        if others:
            raise UserError(
                f"out {out}: holds {_few(others)}, which growth did not make, so it is not replaced; move "
                "that away, or choose another folder"
            )

    def _check_partial(self) -> None:
        partial = self.partial
        if not _exists(partial):
            return
        is_folder = partial.is_dir() and not partial.is_symlink()
        if is_folder and self._may_clear():
            return
        raise UserError(
            f"out: {partial} is in the way and was not made by growth, so it is left alone; move it, or "
            "choose another folder"
        )

    def _may_clear(self) -> bool:
        """Check whether `<out>.partial` is growth's: marked, empty, or just taken out of `out` by a killed
        replacement.

        One listing answers the first two: between two looks, another worker may mark an empty folder.
        """
        names = os.listdir(self.partial)
        if not names or MARK in names:
            return True
        return (self.out / MARK).exists() and not any(strangers(self.partial))

    def open(self) -> Lock:
        """Make `<out>.partial` if need be; return its lock, which nobody has taken yet."""
        self.check()
        self.partial.mkdir(parents=True, exist_ok=True)
        return Lock(self.partial)

    def check_again(self, lock: Lock) -> None:
        """Look again once the folder is locked: another process may have completed it between the look and
        the lock.

        Raises:
            UserError: as `check`, or the folder that is locked is `<out>.partial` no more.
        """
        self.check()
        with suppress(FileNotFoundError):
            locked = os.fstat(lock.descriptor)
            if os.path.samestat(locked, self.partial.lstat()):
                return
        raise UserError(f"out: {self.partial} was completed by another process meanwhile; look at {self.out}")

    def clear(self, mark: str = "{}") -> None:
        """Empty `<out>.partial` and mark it; killed at any moment, it stays marked."""
        if not (self.partial / MARK).exists():
            (self.partial / MARK).touch()
        for entry in self.partial.iterdir():
            if entry.name != MARK:
                _remove(entry)
        beside = self.partial / f"{MARK}.writing"
        beside.write_text(mark)
        beside.rename(self.partial / MARK)

    def discard(self) -> None:
        """Remove `<out>.partial`, its mark last, as far as it can be removed."""
        with suppress(OSError):
            for entry in self.partial.iterdir():
                if entry.name != MARK:
                    _remove(entry)
            (self.partial / MARK).unlink(missing_ok=True)
            self.partial.rmdir()

    def publish(self) -> None:
        """Rename the completed folder to `out`.

        A folder that is there changes places with it in one step, so that at every moment there is one of the
        two; who has its files mapped goes on reading them. Where the system cannot do that in one step, it
        steps aside first.

        Raises:
            UserError: something that growth may not replace has appeared at `out`.
        """
        self._check_out()
        if self.out.exists() and exchange(self.partial, self.out):
            os.rename(self.partial, self.former)
        else:
            if self.out.exists():
                os.rename(self.out, self.former)
            os.rename(self.partial, self.out)  # fails where a folder that holds something has appeared
        (self.out / MARK).unlink(missing_ok=True)
        self._remove_former()

    def _remove_former(self) -> None:
        """Remove what stepped aside, or was left so by a kill: growth's own files alone."""
        if self.former.is_symlink():
            self.former.unlink()
        elif self.former.is_dir() and not any(strangers(self.former)):
            _remove_own(self.former)


@contextmanager
def complete_or_absent(
    out: Path | str, *, overwrite: bool = False, reads: Iterable[Path] = ()
) -> Iterator[Path]:
    """A folder `<out>.partial` to fill; it becomes `out` when the block ends, and is removed when the block
    fails.

    What a killed process left in `<out>.partial` is cleared by the next one; two at once are refused.

    Raises:
        UserError: `out` may not be made or replaced (`Place.check`), another process is filling it, or the
            disk is full or not writable.
    """
    folders = Place(Path(out), overwrite, tuple(reads))
    with disk_faults(folders.out), folders.open() as lock:
        if not lock.take():
            raise UserError(
                f"out: another process is writing {folders.partial}; wait for it, or choose another folder"
            )
        folders.check_again(lock)
        try:
            folders.clear()
            yield folders.partial
            folders.publish()
        except BaseException:
            folders.discard()
            raise


def strangers(folder: Path) -> list[str]:
    """Everything in a folder that growth did not make there, by its own record, files that were changed since
    included; all of it where there is no record.
    """
    own = {**_recorded(folder), MARK: None}
    return sorted(_strangers(folder, own))


def _strangers(folder: Path, own: Mapping[str, str | None], before: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        name = before + entry.name
        is_folder = entry.is_dir() and not entry.is_symlink()
        holds_own = any(file.startswith(f"{name}/") for file in own)
        if is_folder and holds_own:
            yield from _strangers(entry, own, f"{name}/")
        elif name not in own:
            yield name
        elif own[name] not in (None, _fingerprint(entry)):
            yield f"{name} (changed since)"


def files_in(folder: Path) -> dict[str, str | None]:
    """The files of a folder that is about to be completed, for its record: name relative to it → fingerprint,
    None of those that are yet to be written.
    """
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    files = {str(path.relative_to(folder)): path for path in paths}
    marks = (WORKER, f".{WORKER}")
    results = [name for name in files if name != MARK and not name.startswith(marks)]
    finished = {name: _fingerprint(files[name]) for name in sorted(results)}
    return {**finished, "config.json": None, RECIPE: None}


def _fingerprint(file: Path) -> str | None:
    """Hash the size of a file and stretches of it, all over it, in bounded time; None of what is no file."""
    if file.is_symlink() or not file.is_file():
        return None
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as opened:
        for number in range(STRETCHES):
            opened.seek(size * number // STRETCHES)
            digest.update(opened.read(STRETCH))
        opened.seek(max(0, size - STRETCH))
        digest.update(opened.read(STRETCH))
    return digest.hexdigest()


def _recorded(folder: Path) -> dict[str, str | None]:
    """Read which files growth made, by its own record; older records have no fingerprints."""
    try:
        files = read_json(folder / RECIPE).get("files")
    except UserError:
        return {}
    if isinstance(files, list):
        return {str(file): None for file in files}
    if not isinstance(files, dict):
        return {}
    return {name: mark if isinstance(mark, str) else None for name, mark in files.items()}


def _remove_own(folder: Path) -> None:
    """Remove a folder that holds nothing but growth's own files, its record last, so that a kill leaves it
    recognisable.
    """
    for entry in folder.iterdir():
        if entry.name != RECIPE:
            _remove(entry)
    (folder / RECIPE).unlink(missing_ok=True)
    folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    """Check whether there is anything of that name, a dangling link included."""
    return path.exists() or path.is_symlink()


def _holds(folder: Path, path: Path) -> bool:
    """Check whether `folder` is, or contains, `path`: also through links, and where a folder is mounted
    twice."""
    if not folder.exists():
        return False
    stat = folder.stat()
    real = path.resolve()
    parts = filter(Path.exists, (real, *real.parents))
    return any(os.path.samestat(stat, part.stat()) for part in parts)


def _few(names: list[str]) -> str:
    short = [name if len(name) <= 60 else f"{name[:57]}..." for name in names]
    return names_of(short)


@contextmanager
def disk_faults(out: Path, outcome: str = "nothing was kept") -> Iterator[None]:
    """Tell a full or protected disk, and a path that cannot be, as a UserError that says what was kept."""
    try:
        yield
    except OSError as fault:
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(
                next(parent for parent in (out, *out.absolute().parents) if parent.exists())
            ).free
            raise UserError(
                f"out {out}: the disk is full ({free:,} bytes free); {outcome}; free space or choose another "
                "disk"
            ) from None
        if fault.errno == errno.ENOTEMPTY:
            raise UserError(
                f"out {out}: has appeared meanwhile and is not replaced; {outcome}; choose another folder"
            ) from None
        if fault.errno == errno.EFBIG:
            raise UserError(
                f"out {out}: a file would be larger than the file system, or a limit of this process "
                f"(ulimit -f), allows; {outcome}; make smaller files (max_shard_gb), or choose another disk"
            ) from None
        if fault.errno in _EXHAUSTED:
            raise UserError(
                f"out {out}: more files would be open at once than are allowed ({fault.strerror}); "
                f"{outcome}; make larger files (max_shard_gb), or raise the limit (ulimit -n)"
            ) from None
        if fault.errno is None:  # no answer of the system's
            raise
        where = f": {fault.filename}" if fault.filename else ""
        raise UserError(
            f"out {out}: cannot be written ({fault.strerror}{where}); {outcome}; choose a folder you may "
            "write to"
        ) from None
