"""Shards written past the page cache: every byte in its place, whatever the sizes, the order and the file system."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from growth.shards import BUFFER_BYTES, PAGE, Entry, ShardWriter, layout, write_index
from model.checkpoint import Checkpoint, read_header

ROWS = {"a": 7, "b": 1, "c": 513, "d": 3, "e": 2, "f": 900, "g": 1}
COLUMNS = {"a": 3, "b": 5, "c": 1024, "d": 2048, "e": BUFFER_BYTES, "f": 1111, "g": 2048 * 300}  # a row of e is longer than the buffer


def expected() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    return {name: numbers.integers(0, 256, (rows, COLUMNS[name])).astype(np.uint8) for name, rows in ROWS.items()}


def fill(folder: Path, max_shard_bytes: int, threads: int) -> None:
    values = expected()
    entries = [Entry(name, "U8", value.shape) for name, value in values.items()]
    writer = ShardWriter(folder, shards := layout(entries, max_shard_bytes))

    def write(name: str) -> None:
        with writer.tensor(name) as tensor:
            for row in values[name]:
                tensor.space(row.nbytes)[:] = row

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, reversed(values)))
    assert not any(path.read_bytes()[:8].strip(b"\0") for path in folder.glob("*.safetensors")), "a header before everything is written"
    writer.finish()
    writer.close()
    write_index(folder, shards)


@pytest.mark.parametrize(("max_shard_bytes", "threads"), [(1 << 40, 1), (1 << 40, 4), (2_000_000, 3), (1, 2)])
def test_every_byte_is_in_its_place(tmp_path: Path, max_shard_bytes: int, threads: int) -> None:
    fill(tmp_path, max_shard_bytes, threads)
    found = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    for name, value in expected().items():
        np.testing.assert_array_equal(found.pop(name), value, err_msg=name)
    assert not found
    assert all(read_header(file) for file in tmp_path.glob("*.safetensors"))


def test_whole_pages_bypass_the_page_cache_and_only_edges_do_not(tmp_path: Path, monkeypatch: Any) -> None:
    right, direct, cached = os.pwrite, [], []

    def recorded(descriptor: int, data: memoryview, offset: int) -> int:
        past = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        (direct if past else cached).append((offset, len(data)))
        return right(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", recorded)
    fill(tmp_path, 1 << 40, 1)
    assert sum(length for _, length in direct) > 0.98 * sum(rows * COLUMNS[name] for name, rows in ROWS.items())
    assert all(offset % PAGE == 0 and length % PAGE == 0 for offset, length in direct)
    assert all(length < 2 * PAGE for _, length in cached)


@pytest.mark.parametrize("where", ["open", "pwrite", "platform", "fallocate"])
def test_a_file_system_without_direct_writes_gets_the_same_bytes(tmp_path: Path, monkeypatch: Any, where: str) -> None:
    flag, opened, written = os.O_DIRECT, os.open, os.pwrite

    def refusing_open(path: Any, flags: int, *mode: int) -> int:
        if flags & flag:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    def refusing_pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & flag:
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(descriptor, data, offset)

    if where == "open":
        monkeypatch.setattr(os, "open", refusing_open)
    elif where == "pwrite":
        monkeypatch.setattr(os, "pwrite", refusing_pwrite)
    elif where == "platform":
        monkeypatch.delattr(os, "O_DIRECT")
    else:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument")))
    fill(tmp_path, 2_000_000, 2)
    monkeypatch.undo()
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint(tmp_path) as written_back:
        for name, value in expected().items():
            np.testing.assert_array_equal(written_back.read(name), value)


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
