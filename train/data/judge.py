"""Which documents stay: one verdict each, on disk, and a list of all that were left out, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.model.base.files import whole_file, write_json
from outgrow.train.data.blocks import Workshop, digest_of
from outgrow.train.data.duplicates import PERMUTATIONS, SHINGLE_WORDS, Match, band_keys, bands, exact, keys, near
from outgrow.train.data.filter.score import Filter, threshold
from outgrow.train.data.settings import CleaningSettings

KEPT, EMPTY, EXACT, NEAR, OVERLAP, LOW = range(6)
REASONS = {
    EMPTY: "empty_after_normalising",
    EXACT: "exact_duplicate",
    NEAR: "near_duplicate",
    OVERLAP: "benchmark_overlap",
    LOW: "low_score",
}
REMOVED = "removed.parquet"  # in the prepared folder
OPEN_FILES = 256  # of signatures, at a time
_NOTHING = np.frombuffer(digest_of(b""), "<u8")


class Verdicts:
    """Of every document of a build, in files that are mapped: what became of it, and which earlier one it repeats (-1: none)."""

    def __init__(self, work: Workshop, mode: Any = "r") -> None:
        folder, count = work.folder / "verdicts", sum(work.blocks)
        self._starts = work.starts

        def array(name: str, dtype: str) -> np.ndarray:
            return np.memmap(folder / name, dtype, mode, shape=(count,)) if count else np.empty(0, dtype)

        self.verdict, self.earlier, self.similarity = array("verdict", "u1"), array("earlier", "<i8"), array("similarity", "<f4")

    def kept(self, number: int) -> np.ndarray:
        """Of a block's documents, bool (documents,)."""
        return self.verdict[self._starts[number] : self._starts[number + 1]] == KEPT

    def match(self, found: Match, verdict: int) -> None:
        """Of several earlier documents, the first counts."""
        order = np.lexsort((-found.earlier, found.documents))  # the first is written last
        documents, earlier, similarity = found.documents[order], found.earlier[order], found.similarity[order]
        better = (self.verdict[documents] == KEPT) | (earlier < self.earlier[documents])
        documents, earlier, similarity = documents[better], earlier[better], similarity[better]
        self.verdict[documents], self.earlier[documents], self.similarity[documents] = verdict, earlier, similarity


def judge(work: Workshop, clean: CleaningSettings) -> Verdicts:
    """The verdicts of all documents that were read: those of an earlier call, or new ones."""
    folder, count = work.folder / "verdicts", sum(work.blocks)
    if not (folder / "done.json").is_file():
        folder.mkdir(exist_ok=True)
        verdicts = Verdicts(work, "w+")
        verdicts.earlier[:] = -1
        _empty(work, verdicts)
        if clean.exact_duplicates:
            for found in exact(_text_keys(work, verdicts), count, folder / "sort"):
                verdicts.match(found, EXACT)
        if clean.near_duplicates is not None:
            _near(work, verdicts, clean.near_duplicates, folder / "sort")
        _overlap(work, verdicts)
        write_json(folder / "done.json", {"documents": count})
    return Verdicts(work)


def _ranges(work: Workshop) -> Iterator[tuple[int, slice]]:
    """Each block, and the numbers of its documents."""
    starts = work.starts
    return ((number, slice(starts[number], starts[number + 1])) for number in range(len(work.blocks)))


def _empty(work: Workshop, verdicts: Verdicts) -> None:
    for number, where in _ranges(work):
        verdicts.verdict[where][(work.digests(number) == _NOTHING).all(1)] = EMPTY


def _text_keys(work: Workshop, verdicts: Verdicts) -> Iterator[np.ndarray]:
    for number, where in _ranges(work):
        rows = np.flatnonzero(verdicts.verdict[where] == KEPT)
        digests = work.digests(number)[rows]
        yield keys(digests[:, 0], digests[:, 1], rows + where.start)


def _near(work: Workshop, verdicts: Verdicts, threshold: float, folder: Path) -> None:
    shape, starts = bands(threshold), np.array(work.starts)
    signatures_of = lru_cache(OPEN_FILES)(work.signatures)

    def band_rows() -> Iterable[np.ndarray]:
        for number, where in _ranges(work):
            rows = np.flatnonzero(verdicts.verdict[where] == KEPT)
            yield band_keys(work.signatures(number)[rows], rows + where.start, shape)

    def signatures(documents: np.ndarray) -> np.ndarray:
        numbers = np.searchsorted(starts, documents, side="right") - 1
        return np.stack([signatures_of(block)[document - starts[block]] for block, document in zip(numbers, documents, strict=True)])

    for found in near(band_rows(), sum(work.blocks) * shape[0], folder, signatures, threshold):
        verdicts.match(found, NEAR)


def _overlap(work: Workshop, verdicts: Verdicts) -> None:
    for number, where in _ranges(work):
        overlapping = np.array([overlap is not None for overlap in work.overlaps(number)], bool)
        verdicts.verdict[where][overlapping & (verdicts.verdict[where] == KEPT)] = OVERLAP


# ---- the filter -----------------------------------------------------------------------------------------------------------------------


def keep_best(work: Workshop, verdicts: Verdicts, clean: CleaningSettings, advance: Callable[[int], None]) -> None:
    """Score what is left and keep the best share of it; of documents with the lowest score kept, the first.

    Raises:
        UserError: the filter or its encoder cannot be loaded.
    """
    done = work.folder / "verdicts" / "filter.json"
    if clean.filter is None or done.is_file():
        return
    assert clean.keep is not None
    _score(work, verdicts, Path(clean.filter).expanduser(), clean.encoder, advance)
    found = threshold(lambda: (scores_of(work, number) for number in range(len(work.blocks))), clean.keep)
    changed, ties = Verdicts(work, "r+"), found["ties"]
    for number, where in _ranges(work):
        scores = scores_of(work, number)
        low = scores < (np.inf if found["threshold"] is None else np.float32(found["threshold"]))
        tied = np.flatnonzero(scores == np.float32(found["threshold"]))
        low[tied[ties:]] = True
        ties = max(0, ties - len(tied))
        changed.verdict[where][low] = LOW
    write_json(done, {"keep": clean.keep, **found})


def _score(work: Workshop, verdicts: Verdicts, folder: Path, encoder: str | None, advance: Callable[[int], None]) -> None:
    fitted: Filter | None = None
    for number in range(len(work.blocks)):
        sizes, path = work.sizes(number), work.path("scores", number, ".npy")
        if not path.is_file():
            fitted = fitted or Filter(folder, encoder)
            rows, texts = np.flatnonzero(verdicts.kept(number)), work.texts(number)
            scores = np.full(len(texts), np.nan, np.float32)
            scores[rows] = fitted.scores([texts[row] for row in rows])
            with whole_file(path) as partial, partial.open("wb") as file:
                np.save(file, scores)
        advance(int(sizes.sum()))


def scores_of(work: Workshop, number: int) -> np.ndarray:
    """Of a block's documents, float32 (documents,): NaN for one that was not scored."""
    path = work.path("scores", number, ".npy")
    return np.load(path) if path.is_file() else np.full(work.blocks[number], np.nan, np.float32)


# ---- the report -----------------------------------------------------------------------------------------------------------------------


def write_removed(work: Workshop, verdicts: Verdicts, target: Path, clean: CleaningSettings) -> dict[str, Any]:
    """List the documents that are left out in the parquet file `target`: document, bytes, reason, detail.

    Returns:
        documents and bytes for each reason, and the parameters, for the manifest.
    """
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("document", "string"), ("bytes", "int64"), ("reason", "string"), ("detail", "string")])
    counts = {reason: {"documents": 0, "bytes": 0} for reason in REASONS.values()}
    names_of = lru_cache(OPEN_FILES)(work.names)
    with whole_file(target) as partial, pyarrow.parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
        for number, where in _ranges(work):
            if verdicts.verdict[where].any():
                listed = list(_removed(work, verdicts, number, where.start, names_of))
                writer.write_table(pyarrow.Table.from_pylist([_spelt(row) for row in listed], schema))
                for row in listed:
                    counts[row["reason"]]["documents"] += 1
                    counts[row["reason"]]["bytes"] += row["bytes"]
    return {"removed": {reason: count for reason, count in counts.items() if count["documents"]}, **_parameters(work, clean)}


def _removed(work: Workshop, verdicts: Verdicts, number: int, first: int, names_of: Callable[[int], list[str]]) -> Iterator[dict[str, Any]]:
    """A row for each document of a block that is left out. `first`: the number of its first document."""
    starts, names, sizes = np.array(work.starts), names_of(number), work.sizes(number)
    overlaps, scores = work.overlaps(number), scores_of(work, number)
    for row in np.flatnonzero(~verdicts.kept(number)).tolist():
        verdict, earlier, detail = int(verdicts.verdict[first + row]), int(verdicts.earlier[first + row]), ""
        if earlier >= 0:
            block = int(np.searchsorted(starts, earlier, side="right")) - 1
            detail = f"{verdicts.similarity[first + row]:.3f} {names_of(block)[earlier - starts[block]]}"
        elif verdict == OVERLAP:
            detail = str(overlaps[row])
        elif verdict == LOW:
            detail = f"{scores[row]:.3f}"
        yield {"document": names[row], "bytes": int(sizes[row]), "reason": REASONS[verdict], "detail": detail}


def _spelt(row: dict[str, Any]) -> dict[str, Any]:
    """Names of files may hold bytes that are no UTF-8."""
    return {key: value.encode(errors="replace").decode() if isinstance(value, str) else value for key, value in row.items()}


def _parameters(work: Workshop, clean: CleaningSettings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if clean.near_duplicates is not None:
        shape = bands(clean.near_duplicates)
        found["near_duplicates"] = {"shingle_words": SHINGLE_WORDS, "permutations": PERMUTATIONS, "bands": shape[0], "rows": shape[1]}
    if clean.benchmarks is not None:
        found["benchmarks"] = json.loads((work.folder / "benchmarks.json").read_text())
    if clean.filter is not None:
        found["filter"] = json.loads((work.folder / "verdicts" / "filter.json").read_text())
    return found
