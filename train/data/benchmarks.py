"""Decontamination: documents that share NGRAM_WORDS words in a row with a benchmark (the rule of GPT-3, arXiv 2005.14165, appendix C)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import whole_file
from outgrow.train.data.document import Tally
from outgrow.train.data.files import file_digest, files_of, named
from outgrow.train.data.formats import format_of, reading, texts
from outgrow.train.data.words import ngrams, word_hashes, words

NGRAM_WORDS = 13
LARGEST_BYTES = 2**28  # of a benchmark's text file


@dataclass(frozen=True)
class Benchmarks:
    """N-grams of a folder of benchmark files."""

    hashes: np.ndarray  # uint64 (n,), ascending
    owners: np.ndarray  # the first file that each is in, int32 (n,)
    files: tuple[str, ...]

    def overlap(self, found: list[str], hashes: np.ndarray) -> str | None:
        """The first common run of a text's words, and where it is from; None where there is none.

        Args:
            found: its words.
            hashes: theirs.
        """
        if len(found) < NGRAM_WORDS or not len(self.hashes):
            return None
        runs = ngrams(hashes, NGRAM_WORDS)
        places = np.searchsorted(self.hashes, runs).clip(max=len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[places] == runs)
        if not len(hits):
            return None
        first = int(hits[0])
        return f"{self.files[self.owners[places[first]]]}: {' '.join(found[first : first + NGRAM_WORDS])}"


def write_benchmarks(path: str, target: Path) -> dict[str, Any]:
    """Collect the n-grams of every text in the files under `path` into the file `target`; return what there was.

    Texts of json, jsonl and parquet are all their text fields, each on its own. A text of fewer words has no n-gram and cannot be looked
    for: it is counted.

    Raises:
        UserError: there is no file, one cannot be read, or not one text is long enough.
    """
    root, found = files_of(path, "data.clean.benchmarks")
    names = named(root, found)
    count = short = 0
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
    for number, (_, file) in enumerate(names):
        for text in _every_text(file):
            count += 1
            if len(run := words(text)) < NGRAM_WORDS:
                short += 1
                continue
            hashes.append(np.unique(ngrams(word_hashes(run), NGRAM_WORDS)))
            owners.append(np.full(len(hashes[-1]), number, np.int32))
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    if not len(unique):
        raise UserError(
            f"data.clean.benchmarks={path}: not one text of {NGRAM_WORDS} words in {len(names)} files; name the benchmarks' folder"
        )
    listed = np.frombuffer(json.dumps([name for name, _ in names]).encode(), np.uint8)
    with whole_file(target) as partial, partial.open("wb") as out:
        np.savez(out, hashes=unique, owners=np.concatenate(owners)[first], files=listed)
    return {"files": len(names), "texts": count, "too_short": short, "ngrams": len(unique), "ngram_words": NGRAM_WORDS}


@lru_cache(maxsize=1)
def read_benchmarks(path: Path, changed: int) -> Benchmarks:
    """What `write_benchmarks` wrote; `changed` is the file's time, so that a new file is read."""
    with np.load(path) as arrays:
        return Benchmarks(arrays["hashes"], arrays["owners"], tuple(json.loads(arrays["files"].tobytes())))


def benchmarks_identity(path: str) -> str:
    """A hash of all benchmark files."""
    return file_digest(named(*files_of(path, "data.clean.benchmarks")))


def _every_text(path: Path) -> Iterator[str]:
    kind = format_of(path)
    if kind == ".parquet":
        import pyarrow.parquet

        with reading(path) as file:
            for part in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
                yield from _strings(part.to_pylist())
    elif kind in (".json", ".jsonl"):
        with reading(path) as file:
            yield from _strings(_json_values(path, file.read()))
    else:
        yield from (text for _, text in texts(path, "", LARGEST_BYTES, Tally()))


def _json_values(path: Path, raw: bytes) -> list[Any]:
    text = raw.decode(errors="replace")
    try:
        return [json.loads(text)]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: neither JSON nor JSON lines ({error}); mend it, or take it out of data.clean.benchmarks") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
