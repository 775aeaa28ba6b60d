"""One lock for every room: the operating system's, and files with a heartbeat where a file system has
none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from outgrow.model.base import locks
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import one_at_a_time
from outgrow.model.base.locks import Lock
from outgrow.train.run.folder import locked

LACKING = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ENOLCK, errno.EINVAL)


def lacking(number: int) -> Any:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture(params=["flock", *LACKING], ids=str)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With the operating system's locks, and with every way to say that there are none."""
    if request.param != "flock":
        monkeypatch.setattr(fcntl, "flock", lacking(request.param))
    return request.param


@pytest.mark.parametrize("name", ["folder", "file"])
def test_one_holds_it_alone_or_any_number_together(system: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    with Lock(path) as one, Lock(path) as other, Lock(path) as third:
        assert one.take()
        assert not other.take()
        assert not other.take(shared=True)
        assert one.take(shared=True)
        assert other.take(shared=True)
        assert not third.take()
        assert third.take(shared=True)
        assert not one.take(), "two others hold it; and now this one does not"
        assert not other.take(), "the third still holds it"
        assert third.take(), "the last to try"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_another_gives_up_is_waited_for(system: Any, tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "file"), Lock(tmp_path / "file")
    assert first.take()
    threading.Timer(0.3, first.close).start()
    before = time.monotonic()
    second.wait(pytest.fail, 0.01)
    assert time.monotonic() - before > 0.2
    second.close()


def test_who_waits_long_says_once_for_whom(
    system: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.2)
    folder = tmp_path / "text"
    made: list[str] = []

    def second() -> None:
        with one_at_a_time(folder):
            made.append("second")

    waiting = threading.Thread(target=second)
    with one_at_a_time(folder):
        waiting.start()
        time.sleep(0.6)
        made.append("first")
    waiting.join(60)
    assert made == ["first", "second"]
    said = [line for line in capsys.readouterr().err.splitlines() if "no file locks" not in line]
    assert len(said) == 1
    told = rf"process {os.getpid()} on {re.escape(socket.gethostname())}\b"
    assert re.match(rf"{folder}: is being made right now; waiting for {told}", said[0])


@pytest.mark.parametrize("signature", [b"", b"\xff"])
def test_an_unsigned_lock_is_waited_for_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signature: bytes
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.0)
    (tmp_path / "file").write_bytes(signature)
    told: list[str] = []
    with Lock(tmp_path / "file") as first, Lock(tmp_path / "file") as second:
        assert first.take()
        threading.Timer(0.1, first.close).start()
        second.wait(told.append, 0.01)
    assert told == [signature.decode(errors="replace") or "another process"]


RACING = """
import fcntl, os, sys, time
def none(*_): raise OSError(38, "none")
fcntl.flock = none
from pathlib import Path
from outgrow.model.base.locks import Lock
from outgrow.model.base.errors import UserError
path, held = Path(sys.argv[1]), 0
for _ in range(60):
    with Lock(path) as lock:
        if lock.take():
            os.close(os.open(path.with_name("inside"), os.O_CREAT | os.O_EXCL))  # fails where another is inside
            held += 1
            os.unlink(path.with_name("inside"))
print(held)
"""


@pytest.mark.slow
def test_of_many_that_want_it_at_once_never_two_have_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACING, str(tmp_path / "file")]
    racing = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = [process.communicate(timeout=600) for process in racing]
    assert [process.returncode for process in racing] == [0] * 4, said
    assert sum(int(out) for out, _ in said) >= 3  # of 240 attempts: on a busy machine they mostly meet


HOLDING = "\n".join(
    [*RACING.splitlines()[:6], "Lock(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(60)"]
)


def test_a_kill_frees_it_on_its_own_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOSYS))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "file")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with Lock(tmp_path / "file") as lock:
        assert not lock.take()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert lock.take()


def test_a_kill_frees_it_before_the_parent_has_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's first process often never does: the number stays taken."""
    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOSYS))
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "file")]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder,
        Lock(tmp_path / "file") as lock,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert not lock.take()
        holder.kill()
        assert holder.stdout.read() == ""  # until it has ended; not waited for
        until = time.monotonic() + 30
        while not lock.take():
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({}, False),
        ({"born": "1"}, True),  # the number of one that has ended is another's now
        ({"pid": 2**22 + 1}, True),  # no process has this number
        ({"pid": 2**22 + 1, "space": "another container"}, False),  # there one may have it
        ({"pid": 2**22 + 1, "host": "elsewhere"}, False),
    ],
    ids=str,
)
def test_a_fresh_claim_counts_unless_its_process_is_seen_to_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], free: bool
) -> None:
    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOSYS))
    with Lock(tmp_path / "file") as first, Lock(tmp_path / "file") as second:
        assert first.take()
        (claim,) = tmp_path.glob(".file.lock-*")
        owner, *states = claim.read_text().splitlines()
        owner = json.dumps(json.loads(owner) | change)
        claim.write_text("\n".join([owner, *states, ""]))
        assert second.take() is free


@pytest.mark.parametrize(("age", "free"), [(5, False), (locks.STALE_SECONDS + 5, True)])
def test_a_claim_of_another_host_counts_as_long_as_its_heart_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, free: bool
) -> None:
    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOLCK))
    (tmp_path / "file").touch()
    claim = tmp_path / ".file.lock-0123456789abcdef"
    claim.write_text('{"host": "elsewhere", "pid": 1}\nheld alone\n')
    os.utime(claim, (time.time() - age,) * 2)
    with Lock(tmp_path / "file") as lock:
        assert lock.take() is free


def test_a_claim_is_told_with_its_process_and_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOLCK))
    (tmp_path / "run").mkdir()
    claim = tmp_path / ".run.lock-0123456789abcdef"
    claim.write_text('{"host": "node7", "pid": 4711}\nheld alone\n')
    os.utime(claim, (time.time() - 30,) * 2)
    told = (
        r"run: another process is training this run right now: process 4711 on node7, whose last sign of "
        r"life is (29|30|31) s old \(after 60 s without one it counts as ended\)"
    )
    with pytest.raises(UserError, match=told), locked(tmp_path / "run", holds=True):
        pass


@pytest.mark.parametrize("owner", ["", "{", "[]", "{}", '{"host": "here"}', '{"host": 1, "pid": "x"}'])
def test_a_damaged_claim_counts_until_it_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOLCK))
    (tmp_path / "file").touch()
    claim = tmp_path / ".file.lock-0123456789abcdef"
    claim.write_text(f"{owner}\nheld alone\n")
    with Lock(tmp_path / "file") as lock:
        assert not lock.take()
        assert "process ? on an unknown host" in lock.holder()
        os.utime(claim, (0, 0))
        assert lock.take()


def test_a_claim_is_touched_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOLCK))
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    with Lock(tmp_path / "file") as lock:
        assert lock.take()
        (claim,) = tmp_path.glob(".file.lock-*")
        os.utime(claim, (0, 0))
        time.sleep(0.3)
        assert claim.stat().st_mtime > time.time() - 10


def test_it_is_said_once_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", lacking(errno.EOPNOTSUPP))
    for name in ("one", "two"):
        with Lock(tmp_path / name) as lock:
            assert lock.take()
    said = capsys.readouterr().err
    assert said == (
        f"{tmp_path}: no file locks here (Operation not supported); files with a heartbeat stand in "
        "for them\n"
    )


def test_every_room_works_where_there_are_no_locks(
    phi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from outgrow.growth import grow
    from outgrow.train.run import folder

    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOSYS))
    how: dict[str, Any] = {"target": {"num_hidden_layers": 4}, "receipt": False, "max_shard_bytes": 40_000}
    grow(phi_folder, tmp_path / "one", **how)
    for number in range(2):
        grow(phi_folder, tmp_path / "out", worker=f"{number}/2", **how)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    with folder.locked(tmp_path / "run", True):
        assert len(list(tmp_path.glob(".run.lock-*"))) == 1
        with (
            pytest.raises(UserError, match="another process is training this run"),
            folder.locked(tmp_path / "run", True),
        ):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"one", "out"}
    # of this folder, and of the one that workers fill
    assert capsys.readouterr().err.count("no file locks here") == 2
