"""Locks between processes and hosts: the operating system's where the file system has them, else files with a
heartbeat.

The operating system's lock (`flock`) is on a folder or file itself, leaves nothing behind and ends with its
process. Many network file systems have none. There a lock is a file `.<name>.lock-…` beside what is locked:
who wants the lock puts a claim there, looks at the others' claims, and holds the lock when none stands
against it; of several that want it at once the lowest number gets it. A claim is touched every few seconds by
its process, so that one which was left by a kill is known by its age (at once, where its
process would be seen).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

HEARTBEAT_SECONDS, STALE_SECONDS, POLL_SECONDS = 5.0, 60.0, 0.01
PATIENCE_SECONDS = 3.0  # that another's lock is waited for in silence
NAME_CHARACTERS = 150  # of what is locked, in the name of a claim
_told: set[Path] = set()  # folders that were said to have no locks


class Lock:
    """A lock on a folder or a file (which is made if need be), exclusive or shared, until it is closed or its
    process ends.

    Raises (on opening, and on taking):
        OSError: the path cannot be opened, or no claim can be written beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT
        if path.is_dir():
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        self.descriptor = os.open(path, flags, 0o644)
        self._claim: _Claim | None = None

    def take(self, *, shared: bool = False) -> bool:
        """Try to hold the lock, or to hold it in the other way.

        Returns:
            False where another holds it; then this one holds it no more, in whatever way it did.
        """
        if self._claim is None:
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(self.descriptor, kind | fcntl.LOCK_NB)
                return True
            except (BlockingIOError, PermissionError):
                return False
            except (
                OSError
            ) as fault:  # ENOSYS, EOPNOTSUPP, EBADF, ENOLCK, …: as many as there are file systems
                _tell(self.path.parent, fault)
                self._claim = _Claim(self.path)
        return self._claim.take(shared)

    def wait(self, tell: Callable[[str], None], poll_seconds: float = 0.1) -> None:
        """Hold the lock alone, as soon as it is free; after `PATIENCE_SECONDS` tell once who holds it."""
        patience = time.monotonic() + PATIENCE_SECONDS
        has_told = False
        while not self.take():
            if not has_told and time.monotonic() > patience:
                tell(self.holder() or self._signature() or "another process")
                has_told = True
            time.sleep(poll_seconds)

    def sign(self) -> None:
        """Write into the file who holds it, which the operating system's lock does not tell."""
        signature = f"process {os.getpid()} on {socket.gethostname()}\n"
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, signature.encode(), 0)

    def _signature(self) -> str:
        if self.path.is_dir():  # which nobody signs
            return ""
        return self.path.read_text(encoding="utf-8", errors="replace").strip()

    def holder(self) -> str:
        """Say who holds the lock, and until when it counts, where a file tells it; "" elsewhere."""
        return "" if self._claim is None else self._claim.holder()

    def close(self) -> None:
        """Give up the lock; a second time does nothing."""
        if self._claim is not None:
            self._claim.withdraw()
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tell(folder: Path, fault: OSError) -> None:
    if folder not in _told:
        _told.add(folder)
        print(
            f"{folder}: no file locks here ({fault.strerror}); files with a heartbeat stand in for them",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class _Other:
    """Another's claim: its number, whether it holds the lock already, whether it shares it, and whose it is.

    Attributes:
        owner: its host and pid, as far as the file tells them.
        age: seconds since its last sign of life.
    """

    number: str
    holds: bool
    shared: bool
    owner: Mapping[str, Any]
    age: float

    def __str__(self) -> str:
        pid = self.owner.get("pid", "?")
        host = self.owner.get("host", "an unknown host")
        return (
            f"process {pid} on {host}, whose last sign of life is {self.age:.0f} s old (after "
            f"{STALE_SECONDS:.0f} s without one it counts as ended)"
        )


class _Claim:
    """A claim by one process: a file beside what is locked, whose first line says who, whose last what is
    wanted or held.

    Its name never changes, since a folder that is listed while a file is renamed may show neither name.
    """

    def __init__(self, locked: Path) -> None:
        self._folder = locked.absolute().parent
        self._prefix = f".{locked.name[:NAME_CHARACTERS]}.lock-"
        self._number = secrets.token_hex(8)
        name = f"{self._prefix}{self._number}"
        self._file = self._folder / name
        self._ended = threading.Event()
        self._ended.set()
        self._against: list[_Other] = []

    def take(self, shared: bool) -> bool:
        """Put the claim down, and hold it where no other stands against it."""
        self._write("want", shared)
        while True:
            against = [other for other in self._others() if not (shared and other.shared)]
            self._against = [other for other in against if other.holds or other.number < self._number]
            if self._against:
                self.withdraw()
                return False
            if not against:
                self._write("held", shared)
                return True
            # until those with a higher number have seen this one, or hold the lock already
            time.sleep(POLL_SECONDS)

    def holder(self) -> str:
        """The claims for which this one was withdrawn, in words."""
        return "; ".join(map(str, self._against))

    def withdraw(self) -> None:
        self._ended.set()
        self._file.unlink(missing_ok=True)

    def _write(self, state: str, shared: bool) -> None:
        line = f"{state} {'shared' if shared else 'alone'}\n"
        if not self._ended.is_set():
            with self._file.open("a") as file:
                file.write(line)
            return
        pid = os.getpid()
        process = {"host": socket.gethostname(), "space": _space(), "pid": pid, "born": _born(pid)}
        owner = json.dumps(process)
        self._file.write_text(f"{owner}\n{line}")
        self._ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(self._ended,), daemon=True)
        beat.start()

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a network that is away for a moment
                os.utime(self._file)

    def _others(self) -> Iterator[_Other]:
        os.utime(self._file)
        now = self._file.stat().st_mtime  # by the clock of the file system, which all its hosts share
        for path in self._folder.iterdir():
            is_claim = path.name.startswith(self._prefix)
            if not is_claim or path == self._file:
                continue
            with suppress(FileNotFoundError):  # withdrawn meanwhile
                age = now - path.stat().st_mtime
                lines = path.read_text().splitlines()
                if _is_left_over(age, lines):
                    path.unlink()
                else:
                    is_written = len(lines) > 1
                    state = lines[-1].split() if is_written else ["want", "alone"]
                    number = path.name.removeprefix(self._prefix)
                    is_held = state[0] == "held"
                    yield _Other(number, is_held, state[-1] == "shared", _owner(lines), age)


def _is_left_over(age: float, lines: list[str]) -> bool:
    """Check whether a claim's process has ended: where this process sees it, by its number and the time it
    began at, elsewhere by the claim's age in seconds.
    """
    if age > STALE_SECONDS:
        return True
    if len(lines) < 2:
        return False
    owner = _owner(lines)
    is_seen = (owner.get("host"), owner.get("space")) == (socket.gethostname(), _space())
    return is_seen and not _runs(owner["pid"], owner["born"])


def _owner(lines: list[str]) -> Mapping[str, Any]:
    """What a claim's first line says of its process; nothing where that is not written yet, or damaged."""
    try:
        owner = json.loads(lines[0])
        numbers = {"space": str(owner.get("space")), "born": str(owner.get("born"))}
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), **numbers}
    except (IndexError, ValueError, TypeError, KeyError, AttributeError):
        return {}


@cache
def _space() -> str:
    """Where process numbers mean what they mean here: containers that share a host's name have numbers of
    their own. "" where the system does not tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process began, in ticks of its kernel; "ended" where only its status is left for its parent to
    read, "" where the system does not tell.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    _, _, fields = status.rpartition(") ")  # behind the name, which may hold anything
    state, *numbers = fields.split()
    return "ended" if state in "ZX" else numbers[18]


def _runs(pid: int, born: str) -> bool:
    """Check whether the process of that number that began then is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return _born(pid) in (born, "")
