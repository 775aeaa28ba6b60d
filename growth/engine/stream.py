"""Streaming of a plan: every tensor is expanded block by block into the shard that holds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from pathlib import Path

import numpy as np

from outgrow.growth.engine.execute import Expander
from outgrow.growth.engine.rows import Reader
from outgrow.growth.engine.shards import MAX_SHARD_BYTES, Entry, ShardWriter, layout, write_index
from outgrow.growth.plan import Plan
from outgrow.model.composite import nested
from outgrow.model.dtypes import RAW
from outgrow.model.spelling import both_spellings

Shards = Mapping[str, Sequence[Entry]]  # file name → what it holds
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def shards_of(plan: Plan, max_shard_bytes: int) -> dict[str, list[Entry]]:
    """Lay out a plan's tensors in files: file name → entries."""
    entries = [Entry(step.name, plan.dtype(step), step.shape) for step in plan.steps]
    return layout(entries, max_shard_bytes)


def write_config(folder: Path, plan: Plan) -> None:
    """Write the target's config.json for transformers 4 and 5; a dtype that the source's config names
    stays."""
    config = both_spellings(nested(plan.target_config))
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(f"{text}\n")


def write_model(plan: Plan, reader: Reader, folder: Path, *, threads: int) -> None:
    """Make `folder` with what the library needs to load it: shards, their index, config. Nothing is
    verified."""
    folder.mkdir()
    shards = shards_of(plan, MAX_SHARD_BYTES)
    write_weights(plan, reader, folder, shards, threads=threads)
    write_index(folder, shards)
    write_config(folder, plan)


def write_weights(
    plan: Plan,
    reader: Reader,
    folder: Path,
    shards: Shards,
    *,
    threads: int,
    progress: Progress | None = None,
) -> None:
    """Write `shards` of a plan into `folder`, the largest tensors first."""
    entries = chain.from_iterable(shards.values())
    names = {entry.name for entry in entries}
    steps = [step for step in plan.steps if step.name in names]
    steps.sort(key=plan.nbytes, reverse=True)
    writer = ShardWriter(folder, shards)
    total = sum(map(plan.nbytes, steps))
    done = 0

    def write(expander: Expander) -> int:
        """Write one tensor into its shard and return its bytes."""
        if not expander.is_blank:  # zeros are what a new file holds
            _write_blocks(expander, writer)
        return plan.nbytes(expander.step)

    pool = ThreadPoolExecutor(threads)
    try:
        expanders = [Expander(plan, step, reader) for step in steps]
        writing = [pool.submit(write, expander) for expander in expanders]
        _ = plan.hash, plan.certificate  # needed at the end, and computed here while the threads work
        for finished in as_completed(writing):
            done += finished.result()
            if progress is not None:
                progress(done, total)
        writer.finish()
    finally:
        pool.shutdown(cancel_futures=True)
        writer.close()


def _write_blocks(expander: Expander, writer: ShardWriter) -> None:
    """Expand one tensor into its shard, block by block; one array serves all of them."""
    name = expander.step.name
    raw = RAW[expander.dtype]
    columns = expander.width
    row_bytes = columns * raw.itemsize
    blocks = list(expander.blocks())
    _, most_rows = blocks[0]
    buffer = np.empty((most_rows, columns), raw)
    for start, stop in blocks:
        rows = stop - start
        block = buffer[:rows]
        expander.fill(block, start)
        writer.write(name, start * row_bytes, block)
