"""Decontamination: documents that share NGRAM_WORDS words in a row with a benchmark (the rule of GPT-3, arXiv
2005.14165, appendix C).

Words are those of prose, whatever the corpus: spelling in Unicode (NFD, full-width, soft hyphens), case and
spacing play no part, and each letter of a script without spaces is one. An item of fewer words, but of
SHORT_WORDS at least, is looked for as a whole; shorter ones are counted and told. A run that more than
COMMON_DOCUMENTS documents, and COMMON_SHARE of them, have is boilerplate: told, and no reason.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import DocumentsPipeline as Documents
from datatrove.pipeline.base import PipelineStep

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import whole_file
from outgrow.train.corpus.read.document import Tally
from outgrow.train.corpus.read.files import files_of
from outgrow.train.corpus.read.formats import format_of, parse_json, reading, texts
from outgrow.train.corpus.words import ngrams, word_hashes, words

NGRAM_WORDS = 13
SHORT_WORDS = 6  # fewer are said by chance
COMMON_DOCUMENTS, COMMON_SHARE = 10, 0.01
LARGEST_BYTES = 2**28  # of a benchmark's text file


@dataclass(frozen=True)
class Benchmarks:
    """N-grams of a folder of benchmark files: those of NGRAM_WORDS words, and whole items of fewer."""

    hashes: np.ndarray  # uint64 (n,), ascending
    lengths: np.ndarray  # words of each, int32 (n,)
    owners: np.ndarray  # the first file that each is in, int32 (n,)
    files: tuple[str, ...]

    def overlaps(self, text_words: list[str], hashes: np.ndarray) -> list[tuple[int, str]]:
        """The common runs of a text's words, each once, in order: the number of the n-gram, and what it is
        and where from.

        Args:
            text_words: its words.
            hashes: theirs.
        """
        hits: dict[int, int] = {}  # n-gram → its first place
        for length in np.unique(self.lengths).tolist():
            if len(text_words) >= length:
                runs = ngrams(hashes, length)
                last = len(self.hashes) - 1
                numbers = np.searchsorted(self.hashes, runs).clip(max=last)
                same_hash = self.hashes[numbers] == runs
                same = same_hash & (self.lengths[numbers] == length)
                for start in np.flatnonzero(same).tolist():
                    hits.setdefault(int(numbers[start]), start)
        return [
            (number, self._spelt(number, text_words, start))
            for number, start in sorted(hits.items(), key=lambda hit: hit[1])
        ]

    def _spelt(self, number: int, text_words: list[str], start: int) -> str:
        stop = start + int(self.lengths[number])
        file = self.files[self.owners[number]]
        words = " ".join(text_words[start:stop])
        return f"{file}: {words}"


def write_benchmarks(path: str, target: Path) -> dict[str, Any]:
    """Collect the n-grams of every text in the files under `path` into the file `target`; return what there
    was.

    Texts of json, jsonl, csv, tsv and parquet are all their text fields, each on its own. A text of fewer
    than SHORT_WORDS words cannot be looked for: it is counted.

    Raises:
        UserError: there is no file, one cannot be read, or not one text is long enough.
    """
    files = files_of(path, "data.clean.benchmarks")
    counts = {"files": len(files), "texts": 0, "short": 0, "too_short": 0}
    columns: list[tuple[np.ndarray, int, int]] = []  # hashes, their words, the file
    for number, file in enumerate(files):
        for text in _every_text(file.path):
            text_words = words(text)
            counts["texts"] += 1
            counts["too_short"] += len(text_words) < SHORT_WORDS
            counts["short"] += SHORT_WORDS <= len(text_words) < NGRAM_WORDS
            if len(text_words) >= SHORT_WORDS:
                columns.append(
                    (
                        np.unique(ngrams(word_hashes(text_words), NGRAM_WORDS)),
                        min(len(text_words), NGRAM_WORDS),
                        number,
                    )
                )
    if not columns:
        raise UserError(
            f"data.clean.benchmarks={path}: not one text of {SHORT_WORDS} words in {len(files)} files; "
            "name the benchmarks' folder"
        )
    sizes = [len(hashes) for hashes, _, _ in columns]
    own = [hashes for hashes, _, _ in columns]
    every = np.concatenate(own)
    unique, first = np.unique(every, return_index=True)

    def of_each(values: list[int]) -> np.ndarray:
        """A text's number for each of the n-grams that stay, (unique,)."""
        repeated = np.repeat(np.array(values, np.int32), sizes)
        return repeated[first]

    lengths = of_each([length for _, length, _ in columns])
    owners = of_each([owner for _, _, owner in columns])
    names = json.dumps([file.name for file in files])
    listed = np.frombuffer(names.encode(), np.uint8)
    with whole_file(target) as partial, partial.open("wb") as out:
        np.savez(out, hashes=unique, lengths=lengths, owners=owners, files=listed)
    return {**counts, "ngrams": len(unique), "ngram_words": NGRAM_WORDS, "short_words": SHORT_WORDS}


@lru_cache(maxsize=1)
def read_benchmarks(path: Path, changed: int) -> Benchmarks:
    """The n-grams that `write_benchmarks` wrote; `changed` is the file's time, so that a new file is read."""
    with np.load(path) as arrays:
        return Benchmarks(
            arrays["hashes"],
            arrays["lengths"],
            arrays["owners"],
            tuple(json.loads(arrays["files"].tobytes())),
        )


class FindOverlaps(PipelineStep):
    """Note of each document what it has in common with the benchmarks."""

    type, name = "🦠 - DECONT", "benchmarks"

    def __init__(self, ngrams: Path) -> None:
        """`ngrams`: what `write_benchmarks` wrote."""
        super().__init__()
        self.ngrams = ngrams

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        benchmarks = read_benchmarks(self.ngrams, self.ngrams.stat().st_mtime_ns)
        for document in data or ():
            document_words = words(document.text)
            hashes = word_hashes(document_words)
            document.metadata["overlaps"] = benchmarks.overlaps(document_words, hashes)
            yield document


def _every_text(path: str) -> Iterator[str]:
    kind = format_of(path)
    if kind == ".parquet":
        import pyarrow.parquet

        with reading(path) as file:
            for part in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
                yield from _strings(part.to_pylist())
    elif kind in (".json", ".jsonl"):
        with reading(path) as file:
            text = Tally().decode(file.read())
            yield from _strings(_json_values(path, text))
    elif kind in (".csv", ".tsv"):
        with reading(path) as file:
            table = csv.reader(
                io.StringIO(Tally().decode(file.read()), newline=""),
                delimiter="," if kind == ".csv" else "\t",
            )
            yield from (field for row in table for field in row)
    else:
        yield from (text for _, text in texts(path, "", LARGEST_BYTES, Tally()))


def _json_values(path: str, text: str) -> list[Any]:
    try:
        return [parse_json(text)]
    except ValueError:
        pass
    try:
        return [parse_json(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise UserError(
            f"{path}: neither JSON nor JSON lines ({error}); mend it, or take it out of data.clean.benchmarks"
        ) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
