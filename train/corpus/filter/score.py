"""Scoring a corpus with a fitted filter, and finding the best share of it, whatever its size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document as Step
from datatrove.data import DocumentsPipeline as Documents
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from outgrow.model.base.files import whole_file
from outgrow.train.corpus.filter import embed, forest
from outgrow.train.corpus.read.document import Document
from outgrow.train.corpus.workshop import Workshop

BLOCK_DOCUMENTS = 256


class Filter:
    """A forest and the encoder that it was fitted on, loaded."""

    def __init__(self, folder: Path, encoder: str | None = None) -> None:
        """Raises UserError where one of them is missing, damaged, or not the one it was; `encoder` is where
        it lies now."""
        self.forest, self.card = forest.load(folder)
        self.encoder = embed.load_again(self.card["embedding"], encoder)

    def scores(self, texts: list[str]) -> np.ndarray:
        """The probability that each text is labelled 1: float32 (texts,)."""
        features = self.encoder.embed(texts)
        return self.forest.scores(features).astype(np.float32)


@lru_cache(maxsize=1)
def load_filter(folder: str, encoder: str | None) -> Filter:
    """A filter, loaded once a process."""
    return Filter(Path(folder), encoder)


class Educational(BaseFilter):
    """A step that scores each document, and keeps those of `threshold` and more; all of them where there is
    none."""

    name = "🎓 educational"

    def __init__(self, folder: str, encoder: str | None = None, threshold: float | None = None) -> None:
        super().__init__(batch_size=BLOCK_DOCUMENTS)
        self.folder = folder
        self.encoder = encoder
        self.threshold = threshold

    def filter(self, doc: Step) -> bool:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Step]) -> list[bool]:
        fitted = load_filter(self.folder, self.encoder)
        texts = [document.text for document in batch]
        scores = fitted.scores(texts).tolist()
        for document, score in zip(batch, scores, strict=True):
            document.metadata["score"] = score
        least = self.threshold
        return [least is None or score >= least for score in scores]


class KeepScores(PipelineStep):
    """Write down the scores of a task's documents; yield nothing."""

    type, name = "💽 - WRITER", "scores"

    def __init__(self, work: Workshop) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:
        count = self.work.counts[rank]
        scores = np.full(count, np.nan, np.float32)
        for document in data or ():
            row = document.metadata["row"]
            scores[row] = document.metadata["score"]
        path = self.work.path("scores", rank, ".npy")
        with whole_file(path) as partial, partial.open("wb") as file:
            np.save(file, scores)


def write_scores(
    documents: Iterable[Document],
    fitted: Filter,
    target: Path,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Score documents into the parquet file `target`: document, bytes, score. Returns a histogram of 20 equal
    bins of the scores, int64 (20,)."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("document", "string"), ("bytes", "int64"), ("score", "float")])
    histogram = np.zeros(20, np.int64)
    rows = list[Document]()
    with (
        whole_file(target) as partial,
        pyarrow.parquet.ParquetWriter(partial, schema, compression="zstd") as writer,
    ):

        def flush() -> None:
            texts = [row.text for row in rows]
            names = [row.name.encode(errors="replace").decode() for row in rows]
            sizes = [row.bytes for row in rows]
            scores = fitted.scores(texts)
            table = pyarrow.table([names, sizes, scores], schema=schema)
            writer.write_table(table)
            histogram[:] += np.histogram(scores, 20, (0, 1))[0]
            advance(sum(sizes))
            rows.clear()

        for document in documents:
            rows.append(document)
            if len(rows) == BLOCK_DOCUMENTS:
                flush()
        flush()
    return histogram


# ---- the best share ----------------------------------------------------------------------------------------


def threshold(blocks: Callable[[], Iterable[np.ndarray]], keep: float) -> dict[str, Any]:
    """The score that the best `keep` of all documents have, exactly, with two looks at the scores and 2 ×
    65,536 counts in memory.

    Args:
        blocks: yields the scores (n,) in [0, 1] of each block, NaN for a document without one; called twice.

    Returns:
        scored; kept, ⌈keep · scored⌉ of them; threshold, the lowest score kept; ties, how many of those with
        just that score are kept.
    """
    upper = np.zeros(2**16, np.int64)  # how many scores have each upper half of bits
    for keys in map(_ordered, blocks()):
        upper += np.bincount(keys >> 16, minlength=2**16)
    scored = int(upper.sum())
    kept_count = -int(-keep * scored // 1)
    if not kept_count:
        return {"scored": scored, "kept": 0, "threshold": None, "ties": 0}
    high, above = _find_bin(upper, kept_count)
    lower = np.zeros(2**16, np.int64)  # and of those, each lower half
    for keys in map(_ordered, blocks()):
        in_bin = keys[keys >> 16 == high]
        lower += np.bincount(in_bin & 0xFFFF, minlength=2**16)
    low, above_too = _find_bin(lower, kept_count - above)
    key = high << 16 | low
    bits = np.array([key], np.uint32)
    value = float(bits.view(np.float32)[0])
    return {"scored": scored, "kept": kept_count, "threshold": value, "ties": kept_count - above - above_too}


def _ordered(scores: np.ndarray) -> np.ndarray:
    """Integers in the order of the scores: the bits of a float that is not negative are."""
    is_scored = ~np.isnan(scores)
    numbers = scores[is_scored].astype(np.float32)
    return numbers.view(np.uint32).astype(np.int64)


def _find_bin(counts: np.ndarray, number: int) -> tuple[int, int]:
    """The bin, from above, that holds number `number`, and how many are in the bins above it."""
    descending = counts[::-1]
    from_above = np.cumsum(descending)
    rank = int(np.searchsorted(from_above, number))
    above = from_above[rank] - descending[rank]
    return len(counts) - 1 - rank, int(above)
