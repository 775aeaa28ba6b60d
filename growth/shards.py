"""Writing a checkpoint: safetensors shards laid out beforehand and filled at known offsets, in a folder that is complete or absent."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from model.checkpoint import INDEX, SINGLE
from model.dtypes import RAW
from model.errors import UserError

MAX_SHARD_BYTES = 5_000_000_000  # what the Hugging Face hub recommends


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * RAW[self.dtype].itemsize


class ShardWriter:
    """Shards at their final size from the start, so that a full disk is told before any work, and any thread may fill any tensor."""

    def __init__(self, folder: Path, entries: Sequence[Entry], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.places: dict[str, tuple[int, int]] = {}  # name → (file descriptor, byte offset)
        self._descriptors: list[int] = []
        shards = _split(entries, max_shard_bytes)
        files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        try:
            for file, shard in zip(files, shards, strict=True):
                self._allocate(folder / file, shard)
        except BaseException:
            self.close()
            raise
        if len(shards) > 1:
            weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
            index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _allocate(self, path: Path, shard: Sequence[Entry]) -> None:
        header = _header(shard)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        os.posix_fallocate(descriptor, 0, len(header) + sum(entry.nbytes for entry in shard))
        os.pwrite(descriptor, header, 0)
        offset = len(header)
        for entry in shard:
            self.places[entry.name] = (descriptor, offset)
            offset += entry.nbytes

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write raw `values` at byte `start` of tensor `name`."""
        descriptor, offset = self.places[name]
        view = np.ascontiguousarray(values).reshape(-1).data.cast("B")
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + start + done)

    def close(self) -> None:
        """Close the shards."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def _split(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def _header(shard: Sequence[Entry]) -> bytes:
    """A safetensors header, padded so that the data starts at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.nbytes]}
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def complete_or_absent(out: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder `<out>.partial` to fill; it becomes `out` when the block ends, and is removed when the block fails.

    What a killed process left in `<out>.partial` is cleared by the next one; two at once are refused.

    Raises:
        UserError: `out` exists and `overwrite` is false, another process is filling it, or the disk is full or not writable.
    """
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not overwrite:
        raise UserError(f"out {out}: exists already; choose another folder, or overwrite=true to replace it once the new one is complete")
    if out.exists() and not ((out.is_dir() and (out / "config.json").exists()) or not any(out.iterdir())):
        raise UserError(f"out {out}: exists and is no checkpoint folder, so it is not replaced; choose another folder")
    with _disk_faults(out):
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    try:
        _take(lock, partial)
        try:
            with _disk_faults(out):
                _clear(partial)
                yield partial
                _publish(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _take(lock: int, partial: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"out: another process is writing {partial}; wait for it, or choose another folder") from None


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; an old `out` steps aside first and is removed last."""
    replaced = out.with_name(out.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        os.rename(out, replaced)
    os.rename(partial, out)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _disk_faults(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(parent for parent in (out, *out.absolute().parents) if parent.exists())).free
            raise UserError(
                f"out {out}: the disk is full ({free:,} bytes free); nothing was kept; free space or choose another disk"
            ) from None
        if fault.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
            raise UserError(
                f"out {out}: cannot be written ({fault.strerror}: {fault.filename}); choose a folder you may write to"
            ) from None
        raise
