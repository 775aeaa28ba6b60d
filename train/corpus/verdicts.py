"""Verdicts on documents: one each, on disk, and a list of all that were left out, with the reason."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.model.base.files import whole_file
from outgrow.train.corpus.workshop import Workshop

KEPT, EMPTY, EXACT, NEAR, OVERLAP, LOW = range(6)
REASONS = {
    EMPTY: "empty_after_normalising",
    EXACT: "exact_duplicate",
    NEAR: "near_duplicate",
    OVERLAP: "benchmark_overlap",
    LOW: "low_score",
}
REMOVED = "removed.parquet"  # in the prepared folder
OPEN_FILES = 256  # of names, at a time
TOLD = 3  # of boilerplate runs, word by word
_NOTHING = np.frombuffer(hashlib.blake2b(b"", digest_size=16).digest(), "<u8")


@dataclass(frozen=True)
class Match:
    """Documents and the earlier ones that they repeat. int64, int64, float32, each (matches,)."""

    documents: np.ndarray
    earlier: np.ndarray
    similarity: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Match:
        with np.load(path) as arrays:
            documents = arrays["documents"]
            earlier = arrays["earlier"]
            similarity = arrays["similarity"]
        return cls(
            documents.astype(np.int64),
            earlier.astype(np.int64),
            similarity.astype(np.float32),
        )


class Verdicts:
    """The verdict on every document of a build, in files that are mapped: what became of it, and which
    earlier one it repeats (-1: none)."""

    def __init__(self, work: Workshop, mode: Any = "r") -> None:
        folder = work.folder / "verdicts"
        count = sum(work.counts)
        self._starts = work.starts

        def array(name: str, dtype: str) -> np.ndarray:
            if not count:
                return np.empty(0, dtype)
            return np.memmap(folder / name, dtype, mode, shape=(count,))

        self.verdict = array("verdict", "u1")
        self.earlier = array("earlier", "<i8")
        self.similarity = array("similarity", "<f4")

    @classmethod
    def begin(cls, work: Workshop) -> Verdicts:
        """Keep all, but those that normalising left nothing of."""
        (work.folder / "verdicts").mkdir(exist_ok=True)
        verdicts = cls(work, "w+")
        verdicts.earlier[:] = -1
        for task, where in verdicts.ranges():
            is_empty = (work.digests(task) == _NOTHING).all(1)
            verdicts.verdict[where][is_empty] = EMPTY
        return verdicts

    def ranges(self) -> Iterator[tuple[int, slice]]:
        """Each task, and the numbers of its documents."""
        for task, bounds in enumerate(pairwise(self._starts)):
            yield task, slice(*bounds)

    def of_task(self, task: int) -> np.ndarray:
        """The verdicts on a task's documents, uint8 (documents,)."""
        first = self._starts[task]
        stop = self._starts[task + 1]
        return self.verdict[first:stop]

    def kept(self, task: int) -> np.ndarray:
        """Mark those of a task's documents that are kept, bool (documents,)."""
        return self.of_task(task) == KEPT

    def match(self, matches: Match, verdict: int) -> None:
        """Note what repeats an earlier document; of several earlier ones, the first counts."""
        order = np.lexsort((-matches.earlier, matches.documents))  # the first is written last
        documents = matches.documents[order]
        earlier = matches.earlier[order]
        similarity = matches.similarity[order]
        is_kept = self.verdict[documents] == KEPT
        is_first = earlier < self.earlier[documents]
        better = is_kept | is_first
        documents = documents[better]
        self.verdict[documents] = verdict
        self.earlier[documents] = earlier[better]
        self.similarity[documents] = similarity[better]


# ---- benchmarks --------------------------------------------------------------------------------------------


def remove_overlaps(
    work: Workshop, verdicts: Verdicts, common_documents: int, common_share: float
) -> dict[str, Any]:
    """Leave out what overlaps a benchmark, but for boilerplate: runs of words in more than so many, and such
    a share, of the documents.

    Returns:
        the numbers of the n-grams that are boilerplate, and the first few of them as words.
    """
    counts = Counter[int]()
    spelt = dict[int, str]()
    is_kept = verdicts.verdict == KEPT
    most = max(common_documents, common_share * int(is_kept.sum()))
    for _, _, ngram, detail in _overlaps(work, verdicts):
        counts[ngram] += 1
        if counts[ngram] > most:
            spelt.setdefault(ngram, detail)
    for task, row, ngram, _ in _overlaps(work, verdicts):
        if ngram not in spelt:
            number = work.starts[task] + row
            verdicts.verdict[number] = OVERLAP
    examples = sorted(spelt.values())[:TOLD]
    for detail in examples:
        print(
            f"data.clean.benchmarks: boilerplate, in more than {most:.0f} documents, removes none: {detail}",
            file=sys.stderr,
        )
    return {"ngrams": sorted(spelt), "told": examples}


def _overlaps(work: Workshop, verdicts: Verdicts) -> Iterator[tuple[int, int, int, str]]:
    """Task, document in it, n-gram and detail of every overlap of a document that is kept so far."""
    for task, _ in verdicts.ranges():
        is_kept = np.isin(verdicts.of_task(task), (KEPT, OVERLAP))
        for row, ngram, detail in _hits(work.overlaps(task)):
            if row < len(is_kept) and is_kept[row]:
                yield task, row, ngram, detail


def _hits(columns: Any) -> Iterator[tuple[int, int, str]]:
    """Document, n-gram and detail of each overlap that a task wrote down."""
    return zip(columns["document"], columns["ngram"], columns["detail"], strict=True)


# ---- the filter --------------------------------------------------------------------------------------------


def remove_low(work: Workshop, verdicts: Verdicts, limit: dict[str, Any]) -> None:
    """Leave out what scored less than the threshold that was found; of documents with just that score, keep
    the first."""
    ties = limit["ties"]
    limit_score = limit["threshold"]
    threshold = np.float32(limit_score)  # NaN where there is none
    least = np.inf if limit_score is None else threshold
    for task, where in verdicts.ranges():
        scores = scores_of(work, task)
        low = scores < least
        tied = np.flatnonzero(scores == threshold)
        low[tied[ties:]] = True
        ties = max(0, ties - len(tied))
        verdicts.verdict[where][low] = LOW


def scores_of(work: Workshop, task: int) -> np.ndarray:
    """The scores of a task's documents, float32 (documents,): NaN for one that was not scored."""
    path = work.path("scores", task, ".npy")
    if path.is_file():
        return np.load(path)
    count = work.counts[task]
    return np.full(count, np.nan, np.float32)


# ---- the report --------------------------------------------------------------------------------------------


def write_removed(
    work: Workshop, verdicts: Verdicts, target: Path, boilerplate: set[int]
) -> dict[str, dict[str, int]]:
    """List the documents that are left out in the parquet file `target`: document, bytes, reason, detail.

    Args:
        boilerplate: n-grams of benchmarks that are no reason.

    Returns:
        documents and bytes for each reason.
    """
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [("document", "string"), ("bytes", "int64"), ("reason", "string"), ("detail", "string")]
    )
    counts = {reason: {"documents": 0, "bytes": 0} for reason in REASONS.values()}
    names_of = lru_cache(OPEN_FILES)(work.names)
    with (
        whole_file(target) as partial,
        pyarrow.parquet.ParquetWriter(partial, schema, compression="zstd") as writer,
    ):
        for task, where in verdicts.ranges():
            of_task = verdicts.verdict[where]
            if not of_task.any():
                continue
            rows = list(_removed(work, verdicts, task, names_of, boilerplate))
            spelt = list(map(_spelt, rows))
            table = pyarrow.Table.from_pylist(spelt, schema)
            writer.write_table(table)
            for row in rows:
                count = counts[row["reason"]]
                count["documents"] += 1
                count["bytes"] += row["bytes"]
    return {reason: count for reason, count in counts.items() if count["documents"]}


def _removed(
    work: Workshop, verdicts: Verdicts, task: int, names_of: Callable[[int], list[str]], boilerplate: set[int]
) -> Iterator[dict[str, Any]]:
    """A row for each document of a task that is left out."""
    starts = np.array(work.starts)

    def name_of(number: int) -> str:
        """The name of a document of any task."""
        tasks_begun = np.searchsorted(starts, number, side="right")
        other = int(tasks_begun) - 1
        position = number - starts[other]
        return names_of(other)[position]

    names = names_of(task)
    sizes = work.sizes(task)
    scores = scores_of(work, task)
    overlaps: dict[int, str] = {}  # the first of each document
    for row, ngram, detail in _hits(work.overlaps(task)):
        if ngram not in boilerplate:
            overlaps.setdefault(row, detail)
    is_removed = ~verdicts.kept(task)
    removed = np.flatnonzero(is_removed)
    first = work.starts[task]
    for row in removed.tolist():
        number = first + row
        verdict = int(verdicts.verdict[number])
        earlier = int(verdicts.earlier[number])
        detail = ""
        if earlier >= 0:
            similarity = verdicts.similarity[number]
            detail = f"{similarity:.3f} {name_of(earlier)}"
        elif verdict == OVERLAP:
            detail = overlaps[row]
        elif verdict == LOW:
            detail = f"{scores[row]:.3f}"
        size = int(sizes[row])
        reason = REASONS[verdict]
        yield {"document": names[row], "bytes": size, "reason": reason, "detail": detail}


def _spelt(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its text in UTF-8: names of files may hold bytes that are none."""
    return {key: _utf8(value) for key, value in row.items()}


def _utf8(value: Any) -> Any:
    """A text as UTF-8 has it; another value as it is."""
    if not isinstance(value, str):
        return value
    encoded = value.encode(errors="replace")
    return encoded.decode()
