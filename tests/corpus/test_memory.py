"""Memory: what a document, and a pair of near ones, costs while a corpus is built, so that its size is told
beforehand."""

from __future__ import annotations

import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document

from outgrow.model.base.files import write_json
from outgrow.train.corpus import duplicates, pipeline
from outgrow.train.corpus.duplicates import PERMUTATIONS, ExactDuplicates, NearDuplicates, write_matches
from outgrow.train.corpus.read.steps import _texts
from outgrow.train.corpus.verdicts import NEAR, Match, Verdicts
from outgrow.train.corpus.workshop import Workshop
from outgrow.train.data import DataSettings

SETTINGS = DataSettings("t", "files", path="texts")


def workshop(folder: Path, *counts: int) -> Workshop:
    """Documents that were read by as many tasks as there are counts, with signatures that are drawn."""
    work, numbers = Workshop(folder), np.random.default_rng(0)
    (folder / "text").mkdir(parents=True)
    (folder / "signatures").mkdir()
    write_json(work.plan, {"tasks": [f"task{task}" for task in range(len(counts))]})
    write_json(work.read, {"counts": counts, "tally": {}})
    for task, count in enumerate(counts):
        with _texts(work.path("text", task, ".arrow")) as put:
            for i in range(count):
                put(Document(f"text {task} {i}", f"{i}"))
        values = numbers.integers(0, 2**32, (count, PERMUTATIONS), np.uint32)
        values.tofile(work.path("signatures", task, ".bin"))
    Verdicts.begin(work)
    return work


def peak(work: Callable[[], Any]) -> int:
    """Bytes in memory, at most, beside what was there before."""
    work()  # what is imported or kept once is there now
    tracemalloc.start()
    work()
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size


STEPS: dict[str, Callable[[Workshop], Any]] = {
    "exact": lambda work: deque(ExactDuplicates(work)._keys(), 0),
    "near": lambda work: deque(NearDuplicates(work, 0.8)._keys(0), 0),
    "names": lambda work: [len(work.names(task)) for task in range(len(work.counts))],
    "split": lambda work: pipeline.split_of(work, Verdicts(work), SETTINGS),
}


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_memory_is_of_the_largest_task_and_little_a_document(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "BATCH", 500)
    one, more, larger = (
        workshop(tmp_path / f"{number}", *counts)
        for number, counts in enumerate([(2000,), (2000,) * 4, (8000,)])
    )
    before = peak(lambda: STEPS[step](one))
    assert peak(lambda: STEPS[step](more)) < 1.1 * before + 20_000  # four tasks
    assert (peak(lambda: STEPS[step](larger)) - before) / 6000 < 120  # one task of four times as much


def test_a_pair_that_is_found_costs_20_bytes_of_disk_and_60_of_memory(tmp_path: Path) -> None:
    count = 20_000
    work = workshop(tmp_path / "work", 2)
    write_json(work.read, {"counts": [count + 1], "tally": {}})
    numbers, first = np.arange(1, count + 1), np.zeros(count, np.int64)
    pairs = Match(numbers, first, np.ones(count, np.float32))
    written = work.folder / "pairs.npz"
    writing = peak(lambda: write_matches(written, iter([pairs])))
    assert written.stat().st_size / count == pytest.approx(20, rel=0.05)
    verdicts = Verdicts(Workshop(work.folder), "w+")
    reading = peak(lambda: verdicts.match(Match.load(written), NEAR))
    assert max(writing, reading) / count == pytest.approx(60, rel=0.05)
