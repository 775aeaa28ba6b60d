"""Duplicates, exact and near, as steps (deduplication). A document is removed where an earlier one is the
same or near it: the first of a kind stays.

Near is a Jaccard similarity of the sets of SHINGLE_WORDS-word shingles, estimated from PERMUTATIONS MinHash
values (Broder 1997). Candidates are found by locality-sensitive hashing, with the bands and rows that are
best for the threshold where a missed pair weighs nine times a false candidate, for candidates are checked: 14
bands of 9 rows at 0.8, which find 87 % of the pairs of similarity 0.8 and 99.9 % of those of 0.9. Nothing is
removed for being like a document that is removed itself, so chains of small changes do not vanish.

Memory is bounded whatever the corpus: nothing is indexed in memory, and there is no union-find. Keys of
documents are dealt out to as many files on disk as it takes for one to fit into MEMORY_BYTES, and each is
sorted on its own; near duplicates take one task a band. While the build lasts, a document costs on disk 24
bytes (exact), 512 + 24 a band (near: 848 at 0.8) and 13 bytes of verdicts, mapped; a pair that is found costs
20 bytes on disk and 60 in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datatrove.data import DocumentsPipeline as Documents
from datatrove.pipeline.base import PipelineStep

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import whole_file
from outgrow.train.corpus.verdicts import Match, Verdicts
from outgrow.train.corpus.words import ngrams, word_hashes, words
from outgrow.train.corpus.workshop import Workshop

if TYPE_CHECKING:
    from datasketch import MinHash

PERMUTATIONS = 128
SHINGLE_WORDS = 5
FALSE_WEIGHS, MISS_WEIGHS = 0.1, 0.9  # a false candidate, a missed pair
SEED = 1  # of the permutations
BATCH = 4096  # shingles permuted, or documents looked at, at a time
OPEN_FILES = 256  # of signatures, at a time
STEPS = 256  # of the integral over similarities
LEADERS = 64  # different documents of one bucket that the rest of it is compared with
MEMORY_BYTES = 2**27  # of keys in memory at a time
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<i8")])
LARGEST = np.uint32(2**32 - 1)  # a MinHash value; all of them are it where there are no words


# ---- signatures --------------------------------------------------------------------------------------------


def signature(hashes: np.ndarray) -> np.ndarray:
    """MinHash values of the shingles of a text, from the hashes of its words: uint32, (PERMUTATIONS,); no
    words: all the largest."""
    sketch = _empty().copy()
    if len(hashes):
        grams = ngrams(hashes, SHINGLE_WORDS)
        shingles = np.unique(grams).astype(np.uint32)
        for start in range(0, len(shingles), BATCH):
            sketch.update_batch(shingles[start : start + BATCH])
    return sketch.hashvalues


@lru_cache(maxsize=1)
def _empty() -> MinHash:
    return _datasketch().MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=int, scheme="affine32")


@lru_cache
def bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of the locality-sensitive hashing for a similarity: those whose candidates are false and
    missed least, weighed."""
    shapes: list[tuple[int, int]] = []
    for count in range(1, PERMUTATIONS + 1):
        most = PERMUTATIONS // count
        shapes += [(count, rows) for rows in range(1, most + 1)]
    return min(shapes, key=lambda shape: _errors(shape, threshold))


def _errors(shape: tuple[int, int], threshold: float) -> float:
    """The share of pairs, of any similarity alike, that are false candidates or missed, weighed."""
    b, r = shape
    middles = (np.arange(STEPS) + 0.5) / STEPS
    below = middles * threshold
    above = threshold + middles * (1 - threshold)
    false = 1 - (1 - below**r) ** b
    missed = (1 - above**r) ** b
    false_share = false.mean() * threshold
    missed_share = missed.mean() * (1 - threshold)
    return float(FALSE_WEIGHS * false_share + MISS_WEIGHS * missed_share)


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise UserError("data.clean.near_duplicates needs datasketch: pip install -e '.[corpus]'") from error
    return datasketch


# ---- keys, sorted on disk ----------------------------------------------------------------------------------


def keys(high: np.ndarray, low: np.ndarray | int, documents: np.ndarray) -> np.ndarray:
    """Rows of KEY."""
    result = np.empty(len(documents), KEY)
    result["high"] = high
    result["low"] = low
    result["document"] = documents
    return result


def buckets(
    hashed: Iterable[np.ndarray], count: int, folder: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents with equal keys, brought together on disk.

    Args:
        hashed: rows of KEY, whose `high` is evenly spread.
        count: how many at most.
        folder: for temporary files; emptied again.

    Yields:
        The documents of one file's buckets with at least two, int64 (n,), ascending within a bucket, and
        where each bucket starts (b,).
    """
    size = count * KEY.itemsize
    parts = max(1, -(-size // MEMORY_BYTES))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{part:05d}.keys" for part in range(parts)]
    for path in paths:
        path.unlink(missing_ok=True)
    for rows in hashed:
        remainders = rows["high"] % np.uint64(parts)
        dealt = remainders.astype(np.int64)
        for part in np.unique(dealt):
            with paths[part].open("ab") as file:
                rows[dealt == part].tofile(file)
    for path in paths:
        if path.exists():
            yield _sorted(np.fromfile(path, KEY))
            path.unlink()


def _sorted(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents of buckets with at least two, and where each bucket starts, of rows of KEY."""
    order = np.lexsort((rows["document"], rows["low"], rows["high"]))
    rows = rows[order]
    high = rows["high"]
    low = rows["low"]
    documents = rows["document"]
    other_high = high[1:] != high[:-1]
    other_low = low[1:] != low[:-1]
    new = np.ones(len(rows) + 1, bool)  # a bucket begins; the last stands behind all rows
    new[1:-1] = other_high | other_low
    begins = new[:-1]
    shared = ~(begins & new[1:])  # not alone
    return documents[shared], np.flatnonzero(begins[shared])


def exact(hashed: Iterable[np.ndarray], count: int, folder: Path) -> Iterator[Match]:
    """Later copies, where equal keys are equal texts."""
    for documents, starts in buckets(hashed, count, folder):
        sizes = np.diff([*starts, len(documents)])
        firsts = np.repeat(documents[starts], sizes)
        later = documents != firsts
        similarity = np.ones(int(later.sum()), np.float32)
        yield Match(documents[later], firsts[later], similarity)


def near(
    hashed: Iterable[np.ndarray],
    count: int,
    folder: Path,
    signatures: Callable[[np.ndarray], np.ndarray],
    threshold: float,
) -> Iterator[Match]:
    """Documents whose signature agrees in `threshold` of its values with that of an earlier one in a common
    bucket.

    Args:
        signatures: of document numbers (n,), uint32 (n, PERMUTATIONS).
    """
    for documents, starts in buckets(hashed, count, folder):
        bounds = pairwise([*starts, len(documents)])
        own = (documents[start:end] for start, end in bounds)
        matches = chain.from_iterable(_near(bucket, signatures, threshold) for bucket in own)
        while part := list(islice(matches, BATCH)):
            yield _match(part)


def _match(pairs: Sequence[tuple[int, int, float]]) -> Match:
    later, earlier, similarity = zip(*pairs, strict=True)
    return Match(
        np.array(later, np.int64),
        np.array(earlier, np.int64),
        np.array(similarity, np.float32),
    )


def _near(
    bucket: np.ndarray, signatures: Callable[[np.ndarray], np.ndarray], threshold: float
) -> Iterator[tuple[int, int, float]]:
    """A bucket's first document leads; whoever is like no leader leads too."""
    leaders = np.empty((0, PERMUTATIONS), np.uint32)
    led_by: list[int] = []
    for start in range(0, len(bucket), BATCH):
        part = bucket[start : start + BATCH]
        signed = zip(part.tolist(), signatures(part), strict=True)
        for document, values in signed:
            similarity = (leaders == values).mean(1) if led_by else np.zeros(1)
            best = int(similarity.argmax())
            highest = similarity[best]
            if highest >= threshold:
                yield document, led_by[best], float(highest)
            elif len(led_by) < LEADERS:
                leaders = np.vstack([leaders, values])
                led_by = [*led_by, document]


def band_keys(
    signatures: np.ndarray, documents: np.ndarray, shape: tuple[int, int], which: range | None = None
) -> np.ndarray:
    """Rows of KEY, one for each band (of those in `which`) of each document; documents without words have
    none.

    Args:
        signatures: uint32 (n, PERMUTATIONS).
        documents: their numbers (n,).
        shape: bands and rows.
    """
    is_less = signatures != LARGEST
    worded = is_less.any(1)
    signatures = signatures[worded].astype(np.uint64)
    documents = documents[worded]
    count, width = shape
    parts = []
    for band in which or range(count):
        start = band * width
        values = signatures[:, start : start + width]
        parts.append(keys(_hash(values), band, documents))
    return np.concatenate(parts)


def _hash(values: np.ndarray) -> np.ndarray:
    """A hash of each row. uint64 (n, r) → (n,)."""
    return ngrams(values.T, values.shape[1])[0]


# ---- steps -------------------------------------------------------------------------------------------------


class Sign(PipelineStep):
    """Give each document its MinHash signature."""

    type, name = "🫂 - DEDUP", "signatures"

    def __init__(self, kind: str) -> None:
        """`kind`: what a word is (train/corpus/words.py)."""
        super().__init__()
        self.kind = kind

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        for document in data or ():
            hashes = word_hashes(words(document.text, self.kind))
            document.metadata["signature"] = signature(hashes)
            yield document


class ExactDuplicates(PipelineStep):
    """Find later copies of a text, all in one task."""

    type, name = "🫂 - DEDUP", "exact duplicates"

    def __init__(self, work: Workshop) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:
        folder = self.work.folder / "sort" / "exact"
        count = sum(self.work.counts)
        matches = exact(self._keys(), count, folder)
        write_matches(self.work.path("exact", rank, ".npz"), matches)

    def _keys(self) -> Iterator[np.ndarray]:
        work = self.work
        verdicts = Verdicts(work)
        for task, where in verdicts.ranges():
            rows = np.flatnonzero(verdicts.kept(task))
            every_digest = work.digests(task)
            digests = every_digest[rows]
            high = digests[:, 0]
            low = digests[:, 1]
            yield keys(high, low, rows + where.start)


class NearDuplicates(PipelineStep):
    """Find later texts that are near an earlier one, by the keys of one band a task."""

    type, name = "🫂 - DEDUP", "near duplicates"

    def __init__(self, work: Workshop, threshold: float) -> None:
        super().__init__()
        self.work = work
        self.threshold = threshold

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:
        folder = self.work.folder / "sort" / f"near-{rank}"
        count = sum(self.work.counts)
        signatures = self._signatures()
        matches = near(self._keys(rank), count, folder, signatures, self.threshold)
        write_matches(self.work.path("near", rank, ".npz"), matches)

    def _keys(self, band: int) -> Iterator[np.ndarray]:
        work = self.work
        verdicts = Verdicts(work)
        shape = bands(self.threshold)
        own_band = range(band, band + 1)
        for task, where in verdicts.ranges():
            rows = np.flatnonzero(verdicts.kept(task))
            signatures = work.signatures(task, PERMUTATIONS)
            for first in range(0, len(rows), BATCH):  # a task may be one large file
                part = rows[first : first + BATCH]
                documents = part + where.start
                yield band_keys(signatures[part], documents, shape, own_band)

    def _signatures(self) -> Callable[[np.ndarray], np.ndarray]:
        starts = np.array(self.work.starts)

        @lru_cache(OPEN_FILES)
        def of_task(task: int) -> np.ndarray:
            return self.work.signatures(task, PERMUTATIONS)

        def signatures(documents: np.ndarray) -> np.ndarray:
            tasks = np.searchsorted(starts, documents, side="right") - 1
            rows = documents - starts[tasks]
            pairs = zip(tasks, rows, strict=True)
            return np.stack([of_task(task)[row] for task, row in pairs])

        return signatures


def write_matches(path: Path, matches: Iterable[Match]) -> None:
    """Write matches down as one file, whole or not at all."""
    parts = list(matches)

    def column(name: str) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        return np.concatenate(arrays or [np.empty(0)])

    columns = {name: column(name) for name in Match.__dataclass_fields__}
    with whole_file(path) as partial, partial.open("wb") as out:
        np.savez(out, **columns)  # type: ignore[arg-type]
