"""Shards: every byte in its place, whatever the sizes, the order and the file system, and on the disk before
it is said to be there."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import outgrow.growth.engine.shards
from outgrow.growth.engine.shards import PENDING, Entry, ShardWriter, layout, write_index
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.headers import read_header

ROWS = {"a": 7, "b": 1, "c": 513, "d": 3, "e": 2, "f": 900, "g": 1, "h": 0}
COLUMNS = {"a": 3, "b": 5, "c": 1024, "d": 2048, "e": 1 << 21, "f": 1111, "g": 2048 * 300, "h": 4}


def expected() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    return {
        name: numbers.integers(0, 256, (rows, COLUMNS[name])).astype(np.uint8) for name, rows in ROWS.items()
    }


def fill(folder: Path, max_shard_bytes: int, threads: int) -> None:
    values = expected()
    entries = [Entry(name, "U8", value.shape) for name, value in values.items()]
    writer = ShardWriter(folder, shards := layout(entries, max_shard_bytes))

    def write(name: str) -> None:
        for number, row in enumerate(values[name]):
            writer.write(name, number * row.nbytes, row)
        writer.write(name, values[name].nbytes, values[name][:0])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, reversed(values)))
    assert not any(path.read_bytes()[:8].strip(b"\0") for path in folder.glob("*.safetensors")), (
        "a header before everything is written"
    )
    writer.finish()
    writer.close()
    write_index(folder, shards)


@pytest.mark.parametrize(("max_shard_bytes", "threads"), [(1 << 40, 1), (1 << 40, 4), (2_000_000, 3), (1, 2)])
def test_every_byte_is_in_its_place(tmp_path: Path, max_shard_bytes: int, threads: int) -> None:
    fill(tmp_path, max_shard_bytes, threads)
    found = {
        name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()
    }
    for name, value in expected().items():
        np.testing.assert_array_equal(found.pop(name), value, err_msg=name)
    assert not found
    assert all(read_header(file) for file in tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_the_disk_takes_every_page_as_it_is_written_and_the_cache_keeps_few(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Each whole page is begun once, after it was written; some writes later it is waited for and leaves the
    cache."""
    calls: list[tuple[str, int, int]] = []
    right, dropped, synced = os.pwrite, os.posix_fadvise, os.fsync

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(("write", offset, offset + len(data)))
        return right(descriptor, data, offset)

    def sync_file_range(descriptor: int, offset: int, nbytes: int, how: int) -> int:
        calls.append(({1: "wait", 2: "begin"}[how], offset, offset + nbytes))
        return 0

    def posix_fadvise(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        calls.append(("drop", offset, offset + nbytes))
        dropped(descriptor, offset, nbytes, advice)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(("sync", 0, 0)), synced(descriptor))[1])
    monkeypatch.setattr(outgrow.growth.engine.shards, "_sync_file_range", sync_file_range)
    fill(tmp_path, 1 << 40, 1)
    of = {
        kind: [(start, stop) for found, start, stop in calls if found == kind]
        for kind in ("write", "begin", "wait", "drop")
    }
    assert all(start % PAGESIZE == stop % PAGESIZE == 0 for start, stop in of["begin"])
    pages = [page for start, stop in of["begin"] for page in range(start, stop, PAGESIZE)]
    assert len(pages) == len(set(pages))
    assert len(pages) * PAGESIZE > 0.98 * sum(value.nbytes for value in expected().values())
    for place, (kind, start, stop) in enumerate(calls):
        if kind == "begin":
            assert any(wrote == "write" and first < stop <= last for wrote, first, last in calls[:place])
            assert (
                sum(found == "begin" for found, *_ in calls[:place])
                - sum(found == "wait" for found, *_ in calls[:place])
                <= PENDING
            )
        if kind == "wait":
            assert calls[place + 1] == ("drop", start, stop)
    assert of["wait"] == of["begin"][:-PENDING]
    assert calls[-3:] == [("write", 0, calls[-3][2]), ("sync", 0, 0), ("drop", 0, 0)], (
        "the header last, and all of it on the disk"
    )


@pytest.mark.parametrize("where", ["sync_file_range", "posix_fadvise", "platform", "fallocate"])
def test_a_system_without_these_calls_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: Any, where: str
) -> None:
    def refusing(*_: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    def unknown(*_: int) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    if where == "sync_file_range":
        monkeypatch.setattr(outgrow.growth.engine.shards, "_sync_file_range", unknown)
    elif where == "platform":
        monkeypatch.setattr(outgrow.growth.engine.shards, "_sync_file_range", None)
        monkeypatch.delattr(os, "posix_fadvise")
    else:
        monkeypatch.setattr(os, {"fallocate": "posix_fallocate"}.get(where, where), refusing)
    fill(tmp_path, 2_000_000, 2)
    monkeypatch.undo()
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint(tmp_path) as written_back:
        for name, value in expected().items():
            np.testing.assert_array_equal(written_back.read(name), value)


def test_what_the_disk_could_not_take_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    def failing(descriptor: int, offset: int, nbytes: int, how: int) -> int:
        ctypes.set_errno(errno.EIO)
        return -1 if how == 1 else 0

    monkeypatch.setattr(outgrow.growth.engine.shards, "_sync_file_range", failing)
    with pytest.raises(OSError, match="Input/output error"):
        fill(tmp_path, 1 << 40, 2)
    assert not any(path.read_bytes()[:8].strip(b"\0") for path in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("failing", [0, 3])
def test_a_failed_write_is_told_and_leaves_no_header(tmp_path: Path, monkeypatch: Any, failing: int) -> None:
    right, writes = os.pwrite, itertools.count()

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        if next(writes) >= failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path, 1 << 40, 2)
    assert not any(path.read_bytes()[:8].strip(b"\0") for path in tmp_path.glob("*.safetensors"))
