"""Which documents stay: one verdict each, on disk, and a list of all that were left out, with the reason."""

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
    """Which documents repeat which. int64, int64, float32, each (found,)."""

    documents: np.ndarray
    earlier: np.ndarray
    similarity: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Match:
        with np.load(path) as arrays:
            return cls(
                arrays["documents"].astype(np.int64),
                arrays["earlier"].astype(np.int64),
                arrays["similarity"].astype(np.float32),
            )


class Verdicts:
    """Of every document of a build, in files that are mapped: what became of it, and which earlier one it
    repeats (-1: none)."""

    def __init__(self, work: Workshop, mode: Any = "r") -> None:
        folder, count = work.folder / "verdicts", sum(work.counts)
        self._starts = work.starts

        def array(name: str, dtype: str) -> np.ndarray:
            if not count:
                return np.empty(0, dtype)
            return np.memmap(folder / name, dtype, mode, shape=(count,))

        self.verdict, self.earlier, self.similarity = (
            array("verdict", "u1"),
            array("earlier", "<i8"),
            array("similarity", "<f4"),
        )

    @classmethod
    def begin(cls, work: Workshop) -> Verdicts:
        """All kept, but those that normalising left nothing of."""
        (work.folder / "verdicts").mkdir(exist_ok=True)
        verdicts = cls(work, "w+")
        verdicts.earlier[:] = -1
        for task, where in verdicts.ranges():
            verdicts.verdict[where][(work.digests(task) == _NOTHING).all(1)] = EMPTY
        return verdicts

    def ranges(self) -> Iterator[tuple[int, slice]]:
        """Each task, and the numbers of its documents."""
        return ((task, slice(*bounds)) for task, bounds in enumerate(pairwise(self._starts)))

    def kept(self, task: int) -> np.ndarray:
        """Of a task's documents, bool (documents,)."""
        first, stop = self._starts[task : task + 2]
        return self.verdict[first:stop] == KEPT

    def match(self, matches: Match, verdict: int) -> None:
        """Of several earlier documents, the first counts."""
        order = np.lexsort((-matches.earlier, matches.documents))  # the first is written last
        documents = matches.documents[order]
        earlier = matches.earlier[order]
        better = (self.verdict[documents] == KEPT) | (earlier < self.earlier[documents])
        documents = documents[better]
        self.verdict[documents] = verdict
        self.earlier[documents] = earlier[better]
        self.similarity[documents] = matches.similarity[order][better]


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
    most = max(common_documents, common_share * int((verdicts.verdict == KEPT).sum()))
    for _, _, ngram, detail in _overlaps(work, verdicts):
        counts[ngram] += 1
        if counts[ngram] > most:
            spelt.setdefault(ngram, detail)
    for task, row, ngram, _ in _overlaps(work, verdicts):
        if ngram not in spelt:
            verdicts.verdict[work.starts[task] + row] = OVERLAP
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
        first, stop = work.starts[task : task + 2]
        kept = verdicts.kept(task) | (verdicts.verdict[first:stop] == OVERLAP)
        columns = work.overlaps(task)
        hits = zip(columns["document"], columns["ngram"], columns["detail"], strict=True)
        for row, ngram, detail in hits:
            if row < len(kept) and kept[row]:
                yield task, row, ngram, detail


# ---- the filter --------------------------------------------------------------------------------------------


def remove_low(work: Workshop, verdicts: Verdicts, limit: dict[str, Any]) -> None:
    """Leave out what scored less than the threshold that was found; of documents with just that score, keep
    the first."""
    ties = limit["ties"]
    least = np.inf if limit["threshold"] is None else np.float32(limit["threshold"])
    for task, where in verdicts.ranges():
        scores = scores_of(work, task)
        low = scores < least
        tied = np.flatnonzero(scores == np.float32(limit["threshold"]))
        low[tied[ties:]] = True
        ties = max(0, ties - len(tied))
        verdicts.verdict[where][low] = LOW


def scores_of(work: Workshop, task: int) -> np.ndarray:
    """Of a task's documents, float32 (documents,): NaN for one that was not scored."""
    path = work.path("scores", task, ".npy")
    if path.is_file():
        return np.load(path)
    return np.full(work.counts[task], np.nan, np.float32)


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
            if verdicts.verdict[where].any():
                listed = list(_removed(work, verdicts, task, names_of, boilerplate))
                writer.write_table(pyarrow.Table.from_pylist([_spelt(row) for row in listed], schema))
                for row in listed:
                    counts[row["reason"]]["documents"] += 1
                    counts[row["reason"]]["bytes"] += row["bytes"]
    return {reason: count for reason, count in counts.items() if count["documents"]}


def _removed(
    work: Workshop, verdicts: Verdicts, task: int, names_of: Callable[[int], list[str]], boilerplate: set[int]
) -> Iterator[dict[str, Any]]:
    """A row for each document of a task that is left out."""
    starts, names = np.array(work.starts), names_of(task)
    sizes, scores = work.sizes(task), scores_of(work, task)
    first, columns = work.starts[task], work.overlaps(task)
    overlaps: dict[int, str] = {}  # the first of each document
    for row, ngram, detail in zip(columns["document"], columns["ngram"], columns["detail"], strict=True):
        if ngram not in boilerplate:
            overlaps.setdefault(row, detail)
    for row in np.flatnonzero(~verdicts.kept(task)).tolist():
        number = first + row
        verdict = int(verdicts.verdict[number])
        earlier = int(verdicts.earlier[number])
        detail = ""
        if earlier >= 0:
            other = int(np.searchsorted(starts, earlier, side="right")) - 1
            name = names_of(other)[earlier - starts[other]]
            detail = f"{verdicts.similarity[number]:.3f} {name}"
        elif verdict == OVERLAP:
            detail = overlaps[row]
        elif verdict == LOW:
            detail = f"{scores[row]:.3f}"
        yield {"document": names[row], "bytes": int(sizes[row]), "reason": REASONS[verdict], "detail": detail}


def _spelt(row: dict[str, Any]) -> dict[str, Any]:
    """Names of files may hold bytes that are no UTF-8."""
    return {
        key: value.encode(errors="replace").decode() if isinstance(value, str) else value
        for key, value in row.items()
    }
