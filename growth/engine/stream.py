"""Streaming: every tensor of a plan expanded block by block into the shards that hold it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from outgrow.growth.engine.execute import Expander, Reader
from outgrow.growth.engine.shards import MAX_SHARD_BYTES, Entry, ShardWriter, layout, write_index
from outgrow.growth.plan import Plan
from outgrow.model.composite import nested
from outgrow.model.dtypes import RAW
from outgrow.model.spelling import both_spellings

Shards = Mapping[str, Sequence[Entry]]  # file name → what it holds
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def shards_of(plan: Plan, max_shard_bytes: int) -> dict[str, list[Entry]]:
    """The files of a plan's tensors."""
    return layout([Entry(step.name, plan.dtype(step), step.shape) for step in plan.steps], max_shard_bytes)


def write_config(folder: Path, plan: Plan) -> None:
    """The target's config.json, for transformers 4 and 5; a dtype that the source's config names stays."""
    config = both_spellings(nested(plan.target_config))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_model(plan: Plan, reader: Reader, folder: Path, *, threads: int) -> None:
    """Make `folder` with what the library needs to load a growth: shards, their index and the config. Nothing of it is verified."""
    folder.mkdir()
    shards = shards_of(plan, MAX_SHARD_BYTES)
    write_weights(plan, reader, folder, shards, threads=threads)
    write_index(folder, shards)
    write_config(folder, plan)


def write_weights(plan: Plan, reader: Reader, folder: Path, shards: Shards, *, threads: int, progress: Progress | None = None) -> None:
    """Write `shards` of a plan into `folder`, the largest tensors first."""
    wanted = {entry.name for shard in shards.values() for entry in shard}
    steps = sorted((step for step in plan.steps if step.name in wanted), key=plan.nbytes, reverse=True)
    writer = ShardWriter(folder, shards)
    total, done = sum(map(plan.nbytes, steps)), 0

    def write(expander: Expander) -> int:
        name, raw, (_, columns) = expander.step.name, RAW[expander.dtype], expander.matrix
        if not expander.is_blank:  # else it is as a new file is
            blocks = list(expander.blocks())
            block = np.empty((blocks[0][1], columns), raw)
            for start, stop in blocks:
                expander.fill(block[: stop - start], start)
                writer.write(name, start * columns * raw.itemsize, block[: stop - start])
        return plan.nbytes(expander.step)

    pool = ThreadPoolExecutor(threads)
    try:
        writing = [pool.submit(write, Expander(plan, step, reader)) for step in steps]
        _ = plan.hash, plan.certificate  # needed at the end, and computed here while the threads work
        for finished in as_completed(writing):
            done += finished.result()
            if progress is not None:
                progress(done, total)
        writer.finish()
    finally:
        pool.shutdown(cancel_futures=True)
        writer.close()
