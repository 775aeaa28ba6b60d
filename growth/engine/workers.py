"""Several processes that write one checkpoint, each its share of the shards, on hosts that share a file
system.

All are started with the same arguments but for `worker=i/n`. They fill `<out>.partial` together; a shard is
there under its name only when it is complete, and the worker that finds all shards there completes the
folder. A killed worker is started again: what it had finished stays. Each worker holds the lock of the folder
(`model.base.locks`) shared with the others; a growth by one process holds it alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from outgrow.growth.engine.rows import Reader
from outgrow.growth.engine.stream import Progress, Shards, write_weights
from outgrow.growth.folder import MARK, WORKER, Place, disk_faults
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.base.locks import Lock
from outgrow.model.checkpoint import Checkpoint

SAMPLES = 16  # rows of each tensor of the source that workers compare
PATIENCE = 10.0  # seconds to wait for a worker that is clearing or completing the folder


@dataclass(frozen=True)
class Worker:
    """One of `count` workers, numbered from 0."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Worker:
        """Parse `i/n`.

        Raises:
            UserError: it is not of that form.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        if number >= count:
            raise UserError(f"worker={text}: expected i/n, worker i of n counted from 0, such as 0/4")
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share(self, shards: Shards) -> list[str]:
        """Choose the files that this worker writes.

        Raises:
            UserError: there are fewer shards than workers.
        """
        if len(shards) < self.count:
            entries = chain.from_iterable(shards.values())
            total = sum(entry.nbytes for entry in entries)
            size = total / self.count / 1e9
            raise UserError(
                f"worker={self}: {len(shards)} shards for {self.count} workers; give "
                f"max_shard_gb={size:.2g} or less"
            )
        return list(shards)[self.number :: self.count]


@dataclass(frozen=True)
class Shared:
    """The folder that workers fill together, while this one holds it (`lock`) and its own number (`own`)."""

    folders: Place
    lock: Lock
    own: Lock

    @property
    def folder(self) -> Path:
        return self.folders.partial

    def is_complete(self, shards: Shards) -> bool:
        """Check that every shard is there and no other worker is at work; then this one holds the folder
        alone.

        A worker gives up its hold (`Lock.take`) before it looks, so of several that finish at once the last
        to try finds all shards there and nobody at work.
        """
        is_alone = self.lock.take()
        files = [self.folder / file for file in shards]
        return is_alone and all(map(Path.exists, files))


def agreement(plan: Plan, checkpoint: Checkpoint, shards: Shards, worker: Worker) -> dict[str, Any]:
    """Describe what makes shards belong together: the plan, the number of workers, the files, the source's
    weights.

    Of the weights, `SAMPLES` rows of every tensor, from the first to the last.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(checkpoint.tensors):
        shape = checkpoint.tensors[name].shape
        is_stack = len(shape) > 2
        leading = shape[:-1] if is_stack else shape[:1]
        rows = prod(leading)
        last = rows - 1
        spread = {number * last // (SAMPLES - 1) for number in range(SAMPLES)}
        for row in sorted(spread) if rows and shape else ():
            sample = checkpoint.read(name, row, row + 1)
            digest.update(sample.tobytes())
        if not shape:
            digest.update(checkpoint.read(name).tobytes())
    files = {file: [entry.name for entry in shard] for file, shard in shards.items()}
    source = digest.hexdigest()
    return {"plan": plan.hash, "workers": worker.count, "source": source, "files": files}


@contextmanager
def shared_partial(folders: Place, worker: Worker, agreed: Mapping[str, Any]) -> Iterator[Shared]:
    """Share `<out>.partial` with other workers that agree; the rest of another plan's growth is cleared.

    Raises:
        UserError: `out` may not be made or replaced (`Place.check`), a growth of another kind is writing
            there, this worker is at work already, or the disk is full or not writable.
    """
    outcome = f"what is finished stays in {folders.partial}, for the same worker to go on"
    with disk_faults(folders.out, outcome), folders.open() as lock:
        _join(lock, folders, agreed)
        mark = folders.partial / f"{WORKER}{worker.number}"
        with Lock(mark) as own:
            if not own.take():
                raise UserError(
                    f"worker={worker}: is at work already in {folders.partial}; give every worker a number "
                    "of its own"
                )
            yield Shared(folders, lock, own)


def _join(lock: Lock, folders: Place, agreed: Mapping[str, Any]) -> None:
    """Take the folder's lock, shared with others that agree."""
    mark = json.dumps(agreed)
    partial = folders.partial
    patience = time.monotonic() + PATIENCE
    while True:
        if lock.take():  # nobody is here
            folders.check_again(lock)
            if not _agrees(partial, mark):
                folders.clear(mark)
        if lock.take(shared=True):
            if _agrees(partial, mark):
                return
            raise UserError(
                f"out: another growth is being written into {partial}; wait for it, or choose another folder"
            )
        if time.monotonic() > patience:
            raise UserError(
                f"out: another process is writing {partial}; wait for it, or choose another folder"
            )
        time.sleep(0.05)


def _agrees(partial: Path, mark: str) -> bool:
    path = partial / MARK
    return path.exists() and path.read_text() == mark


def write_share(
    plan: Plan,
    reader: Reader,
    checkpoint: Checkpoint,
    shared: Shared,
    shards: Shards,
    worker: Worker,
    *,
    threads: int,
    progress: Progress | None = None,
) -> None:
    """Write this worker's shards one after the other, except those that are there already."""
    folder = shared.folder
    own = worker.share(shards)
    missing = [file for file in own if not (folder / file).exists()]
    for file in missing:
        unfinished = f"{file}.writing"
        (folder / unfinished).unlink(missing_ok=True)  # a killed worker's
        shard = {unfinished: shards[file]}
        write_weights(plan, reader, folder, shard, threads=threads, progress=progress)
        checkpoint.check_unchanged()
        os.rename(folder / unfinished, folder / file)


def publish_shared(shared: Shared, worker: Worker) -> None:
    """Rename a completed folder, which this worker holds alone, to `out`."""
    shared.own.close()  # its lock may be a file in the folder
    for number in range(worker.count):
        mark = shared.folder / f"{WORKER}{number}"
        mark.unlink(missing_ok=True)
    shared.folders.publish()
