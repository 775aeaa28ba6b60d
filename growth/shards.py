"""Writing a checkpoint: safetensors shards laid out beforehand and filled at known offsets, in a folder that is complete or absent."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from model.checkpoint import INDEX, SINGLE
from model.dtypes import RAW
from model.errors import UserError
from model.whole import partial_of, whole

MAX_SHARD_BYTES = 5_000_000_000  # what the Hugging Face hub recommends
PAGE = 4096  # direct writes start and end at multiples of it, in the file and in memory
BUFFER_BYTES = (1 << 21) + 2 * PAGE  # a block of rows, and what the one before left of a page


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
    """Shards at their final size from the start, so that a full disk is told before any work, and any thread may fill any tensor.

    Whole pages go to the disk directly, past the page cache (`O_DIRECT`) where the file system has that: a checkpoint is larger than what
    the cache should hold, and copying into fresh cache pages costs more than computing the weights does. What shares a page with a
    neighbour is kept until `finish`, which writes it and the headers; so a file that was not finished has no header.
    """

    def __init__(self, folder: Path, shards: Mapping[str, Sequence[Entry]]) -> None:
        self._places: dict[str, tuple[_File, int]] = {}  # name → (file, byte offset)
        self._files: list[_File] = []
        self._spare: list[mmap.mmap] = []
        try:
            for file, shard in shards.items():
                self._allocate(folder / file, shard)
        except BaseException:
            self.close()
            raise

    def _allocate(self, path: Path, shard: Sequence[Entry]) -> None:
        header = _header(shard)
        file = _File(path, len(header) + sum(entry.nbytes for entry in shard))
        self._files.append(file)
        file.edges.append((0, header))
        offset = len(header)
        for entry in shard:
            self._places[entry.name] = (file, offset)
            offset += entry.nbytes

    @contextmanager
    def tensor(self, name: str) -> Iterator[TensorWriter]:
        """A writer of tensor `name`, front to back; at the block's end all of it is on its way."""
        file, offset = self._places[name]
        tensor = TensorWriter(file, offset, self._spare.pop() if self._spare else mmap.mmap(-1, BUFFER_BYTES))
        yield tensor
        tensor.finish()
        self._spare.append(tensor.buffer)

    def finish(self) -> None:
        """Write what remains once every tensor is done: the pages that tensors share, and the headers."""
        for file in self._files:
            file.write_edges()

    def close(self) -> None:
        """Close the shards."""
        for file in self._files:
            file.close()
        self._files.clear()


class TensorWriter:
    """One tensor, filled front to back through a buffer whose pages are the file's pages.

    Attributes:
        buffer: lies at file offset `base`; its bytes `first:used` are filled and not yet written.
    """

    def __init__(self, file: _File, offset: int, buffer: mmap.mmap) -> None:
        self.file, self.buffer = file, buffer
        self.first = self.used = offset % PAGE
        self.base = offset - self.first

    def space(self, nbytes: int) -> np.ndarray:
        """The next `nbytes` of the tensor, to be filled before the next call (uint8)."""
        if self.used + nbytes > len(self.buffer):
            self._write_pages()
        if self.used + nbytes > len(self.buffer):
            larger = mmap.mmap(-1, self.used + nbytes)
            larger[: self.used] = self.buffer[: self.used]
            self.buffer = larger
        self.used += nbytes
        return np.frombuffer(self.buffer, np.uint8, nbytes, self.used - nbytes)

    def finish(self) -> None:
        """Write the rest."""
        self._write_pages()
        self.file.edges.append((self.base + self.first, self.buffer[self.first : self.used]))

    def _write_pages(self) -> None:
        """Write the pages that are full and move what follows them to the buffer's start."""
        start, stop = -(-self.first // PAGE) * PAGE, self.used // PAGE * PAGE
        if start >= stop:
            return
        self.file.edges.append((self.base + self.first, self.buffer[self.first : start]))
        self.file.write(self.base + start, memoryview(self.buffer)[start:stop])
        self.buffer[: self.used - stop] = self.buffer[stop : self.used]
        self.base, self.first, self.used = self.base + stop, 0, self.used - stop


class _File:
    """One file of known size. Writes of whole pages from memory at page boundaries bypass the page cache where that is possible."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.edges: list[tuple[int, bytes]] = []  # (offset, bytes) of pages that more than one writer fills
        self._cached = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._direct = self._cached
        try:
            _allocate(self._cached, nbytes)
            self._direct = os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
        except OSError as fault:
            if fault.errno != errno.EINVAL:  # a file system without direct writes
                self.close()
                raise

    def write(self, offset: int, pages: memoryview) -> None:
        try:
            _write_all(self._direct, offset, pages)
        except OSError as fault:
            if fault.errno != errno.EINVAL:  # one whose pages are larger than ours
                raise
            _write_all(self._cached, offset, pages)

    def write_edges(self) -> None:
        for offset, part in self.edges:
            _write_all(self._cached, offset, memoryview(part))
        self.edges.clear()

    def close(self) -> None:
        for descriptor in {self._cached, self._direct}:
            os.close(descriptor)


def _allocate(descriptor: int, nbytes: int) -> None:
    """Give a file its size, and the space where the file system can promise it."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, nbytes)


def _write_all(descriptor: int, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def layout(entries: Sequence[Entry], max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[Entry]]:
    """Which tensors go into which file, in the order of `entries`: file name → entries."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[Entry]]) -> None:
    """The index of several shards; one alone needs none."""
    if len(shards) > 1:
        weight_map = {entry.name: file for file, shard in shards.items() for entry in shard}
        index = {"metadata": {"total_size": sum(entry.nbytes for shard in shards.values() for entry in shard)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
    partial = place_of(out, overwrite)
    with disk_faults(out):
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    try:
        if not locked(lock, fcntl.LOCK_EX):
            raise UserError(f"out: another process is writing {partial}; wait for it, or choose another folder")
        with disk_faults(out), whole(out):
            clear(partial)
            yield partial
    finally:
        os.close(lock)


def place_of(out: Path, overwrite: bool) -> Path:
    """Where `out` is made: `<out>.partial`.

    Raises:
        UserError: `out` exists and may not be replaced.
    """
    if out.exists() and not overwrite:
        raise UserError(f"out {out}: exists already; choose another folder, or overwrite=true to replace it once the new one is complete")
    if out.exists() and not ((out.is_dir() and (out / "config.json").exists()) or not any(out.iterdir())):
        raise UserError(f"out {out}: exists and is no checkpoint folder, so it is not replaced; choose another folder")
    return partial_of(out)


def locked(descriptor: int, how: int) -> bool:
    """Try to lock a folder, exclusively or shared (`fcntl.LOCK_EX`, `LOCK_SH`), until it is closed or its process ends."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def clear(folder: Path) -> None:
    """Remove everything in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def disk_faults(out: Path, kept: str = "nothing was kept") -> Iterator[None]:
    """Tell a full or protected disk as a UserError that says what was kept."""
    try:
        yield
    except OSError as fault:
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(parent for parent in (out, *out.absolute().parents) if parent.exists())).free
            raise UserError(f"out {out}: the disk is full ({free:,} bytes free); {kept}; free space or choose another disk") from None
        if fault.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
            raise UserError(
                f"out {out}: cannot be written ({fault.strerror}: {fault.filename}); choose a folder you may write to"
            ) from None
        raise
