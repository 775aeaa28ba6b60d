"""Writing of a checkpoint: safetensors shards laid out beforehand and filled at known offsets."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.model.dtypes import bytes_of
from outgrow.model.headers import INDEX, SINGLE

MAX_SHARD_BYTES = 5_000_000_000  # what the Hugging Face hub recommends
PENDING = 32  # writes under way while the next ones are computed: of 2 MB each, 64 MB of page cache

_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # from a file system without such a call
_sync_file_range: Any = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_Range = tuple[int, int, int]  # of a file: (descriptor, byte offset, bytes)


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return bytes_of(self.dtype, self.shape)


class ShardWriter:
    """Shards at their final size from the start: a full disk shows before any work, any thread fills any
    tensor.

    The disk starts on every write at once, and some writes later its pages leave the page cache, when the
    disk has them. A checkpoint is larger than what the cache should hold, and the few pages that are reused
    stay warm, where fresh ones can cost more than computing the weights does. Headers are written by
    `finish`; a file that was not finished has none.
    """

    def __init__(self, folder: Path, shards: Mapping[str, Sequence[Entry]]) -> None:
        self._places: dict[str, tuple[int, int]] = {}  # name → (file descriptor, byte offset)
        self._headers: dict[int, bytes] = {}
        self._recent: deque[_Range] = deque()  # the last writes
        try:
            for file, shard in shards.items():
                self._allocate(folder / file, shard)
        except BaseException:
            self.close()
            raise

    def _allocate(self, path: Path, shard: Sequence[Entry]) -> None:
        header = _header(shard)
        new = os.O_RDWR | os.O_CREAT | os.O_EXCL
        descriptor = os.open(path, new, 0o644)
        self._headers[descriptor] = header
        nbytes = sum(entry.nbytes for entry in shard)
        _allocate(descriptor, len(header) + nbytes)
        offset = len(header)
        for entry in shard:
            self._places[entry.name] = (descriptor, offset)
            offset += entry.nbytes

    def write(self, name: str, start: int, raw: np.ndarray) -> None:
        """Write the bytes of tensor `name` from byte `start` of it on."""
        if raw.size == 0:
            return
        descriptor, offset = self._places[name]
        start += offset
        stop = start + raw.nbytes
        _write_all(descriptor, start, raw.data.cast("B"))
        first = start // PAGESIZE * PAGESIZE
        last = stop // PAGESIZE * PAGESIZE
        if first == last:
            return  # a page that is not full waits for what follows
        written = (descriptor, first, last - first)
        _sync_range(*written, wait=False)
        self._recent.append(written)
        if len(self._recent) > PENDING:
            earlier = self._recent.popleft()
            _sync_range(*earlier, wait=True)
            _uncache(*earlier)

    def finish(self) -> None:
        """Write the headers once every tensor is written, and wait until the disk has everything."""
        for descriptor, header in self._headers.items():
            _write_all(descriptor, 0, memoryview(header))
            os.fsync(descriptor)
            _uncache(descriptor, 0, 0)

    def close(self) -> None:
        """Close the shards."""
        for descriptor in self._headers:
            os.close(descriptor)
        self._headers.clear()


def _sync_range(descriptor: int, offset: int, nbytes: int, *, wait: bool) -> None:
    """Start writing a part of a file to disk, or wait for what was started (Linux's sync_file_range)."""
    before, begin = 1, 2  # SYNC_FILE_RANGE_WAIT_BEFORE, SYNC_FILE_RANGE_WRITE
    if _sync_file_range is None:
        return
    step = before if wait else begin
    if _sync_file_range(descriptor, offset, nbytes, step) == 0:
        return
    if (fault := ctypes.get_errno()) not in _UNSUPPORTED:
        raise OSError(fault, os.strerror(fault))


def _uncache(descriptor: int, offset: int, nbytes: int) -> None:
    """Drop a part of a file (0 bytes: all that follows) from the page cache, as far as the disk has it."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # advice that a file system need not take
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _allocate(descriptor: int, nbytes: int) -> None:
    """Give a file its size, and the space where the file system can promise it."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as fault:
        if fault.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(descriptor, nbytes)


def _write_all(descriptor: int, offset: int, view: memoryview) -> None:
    bytes_written = 0
    while bytes_written < len(view):
        rest = view[bytes_written:]
        position = offset + bytes_written
        bytes_written += os.pwrite(descriptor, rest, position)


def layout(entries: Sequence[Entry], max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[Entry]]:
    """Distribute tensors over files, in the order of `entries`: file name → entries."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        is_full = filled + entry.nbytes > max_shard_bytes
        if shards[-1] and is_full:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def write_index(folder: Path, shards: Mapping[str, Sequence[Entry]]) -> None:
    """Write the index of several shards; one alone needs none."""
    if len(shards) > 1:
        weight_map: dict[str, str] = {}
        for file, shard in shards.items():
            weight_map |= {entry.name: file for entry in shard}
        entries = chain.from_iterable(shards.values())
        total = sum(entry.nbytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2)
        (folder / INDEX).write_text(f"{text}\n")


def _header(shard: Sequence[Entry]) -> bytes:
    """Compose a safetensors header, padded so that the data starts at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        stop = offset + entry.nbytes
        shape = list(entry.shape)
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": shape,
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
