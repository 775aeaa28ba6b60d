"""What prepared folders hold: shares, lengths, filter scores, samples. Documents are read in batches, so
memory does not grow with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.train.corpus.listing import LISTING
from outgrow.train.corpus.verdicts import REMOVED
from outgrow.train.data.shards import SPLITS, TokenData, open_data, read_manifest

LENGTHS = 2 ** np.arange(33)  # edges of the bins of tokens a document: powers of two
SCORES = np.linspace(0, 1, 41)
BATCH = 65_536  # documents


@dataclass(frozen=True)
class Sample:
    """A document drawn at random."""

    document: str
    split: str
    tokens: int
    score: float | None
    text: str


@dataclass(frozen=True)
class Source:
    """One prepared folder, counted."""

    name: str
    manifest: dict[str, Any]
    lengths: np.ndarray  # documents in each bin of LENGTHS, (32,)
    kept_scores: np.ndarray  # in each bin of SCORES, (40,); all 0 where nothing was scored
    low_scores: np.ndarray  # of documents removed for their score
    samples: tuple[Sample, ...]

    @property
    def scored(self) -> bool:
        """Whether a filter was at work."""
        return bool(self.kept_scores.any() or self.low_scores.any())

    def total(self, what: str) -> int:
        """Documents, bytes or tokens of both splits."""
        return sum(split[what] for split in self.manifest["splits"].values())


def inspect(folder: Path, *, samples: int, characters: int, seed: int) -> Source:
    """Count the documents of a prepared folder, and draw `samples` of each split.

    Raises:
        UserError: there is none, it is damaged, or it was prepared before documents were listed.
    """
    data, manifest = open_data(folder), read_manifest(folder)
    assert manifest is not None
    if not (folder / LISTING).is_file():
        way_out = (
            "tokens that others made have no list of documents"
            if manifest["settings"].get("corpus") == "tokens"
            else "prepare it again"
        )
        raise UserError(f"{folder}: no {LISTING} in it; {way_out}")
    numbers = np.random.default_rng(seed)
    wanted: dict[str, np.ndarray] = {}  # the numbers of the documents to show of each split, in order
    for name in SPLITS:
        count = manifest["splits"][name]["documents"]
        wanted[name] = np.sort(numbers.choice(count, min(samples, count), replace=False))
    lengths = np.zeros(len(LENGTHS) - 1, np.int64)
    scores = np.zeros(len(SCORES) - 1, np.int64)
    drawn: list[Sample] = []
    # of each split, how many documents and tokens the earlier parts of the list have
    seen = dict.fromkeys(SPLITS, 0)
    starts = dict.fromkeys(SPLITS, 0)
    for part in _batches(folder / LISTING):
        lengths += np.histogram(part["tokens"], LENGTHS)[0]
        is_scored = ~np.isnan(part["score"])
        scores += np.histogram(part["score"][is_scored], SCORES)[0]
        for name in SPLITS:
            rows = np.flatnonzero(part["split"] == name)
            ends = starts[name] + np.cumsum(part["tokens"][rows])
            places = wanted[name] - seen[name]
            for place in places[(places >= 0) & (places < len(rows))]:
                row = {key: column[rows[place]] for key, column in part.items()}
                drawn.append(_sample(data, name, row, int(ends[place]), characters))
            seen[name] += len(rows)
            if len(rows):
                starts[name] = int(ends[-1])
    drawn.sort(key=lambda sample: SPLITS.index(sample.split))
    return Source(folder.name, manifest, lengths, scores, _low_scores(folder / REMOVED), tuple(drawn))


def _batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for part in file.iter_batches(batch_size=BATCH):
            columns = {
                name: part.column(name).to_numpy(zero_copy_only=False)
                for name in ("document", "split", "tokens", "score")
            }
            yield columns | {"score": columns["score"].astype(np.float32)}


def _sample(data: TokenData, split: str, row: dict[str, Any], end: int, characters: int) -> Sample:
    from tokenizers import Tokenizer

    tokens = int(row["tokens"])
    ids = getattr(data, split).tokens[end - tokens : end - 1]  # without its end of text
    tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    first = ids[: 4 * characters].tolist()
    text = tokenizer.decode(first, skip_special_tokens=False)
    score = None if np.isnan(row["score"]) else float(row["score"])
    return Sample(str(row["document"]), split, tokens, score, text[:characters])


def _low_scores(path: Path) -> np.ndarray:
    import pyarrow.compute
    import pyarrow.parquet

    histogram = np.zeros(len(SCORES) - 1, np.int64)
    with pyarrow.parquet.ParquetFile(path) as file:
        for part in file.iter_batches(batch_size=BATCH, columns=["reason", "detail"]):
            low = part.filter(pyarrow.compute.equal(part.column("reason"), "low_score"))
            histogram += np.histogram(
                low.column("detail").to_numpy(zero_copy_only=False).astype(np.float64), SCORES
            )[0]
    return histogram


def used_bins(sources: Sequence[Source]) -> tuple[int, int]:
    """The first and the last bin of LENGTHS that holds a document."""
    used = np.flatnonzero(np.sum([source.lengths for source in sources], axis=0))
    return int(used[0]), int(used[-1])


# ---- as text -----------------------------------------------------------------------------------------------


def report(sources: Sequence[Source]) -> str:
    """Tables in Markdown: what each source holds and what was left out of it, how long its documents are,
    what they scored; samples."""
    return (
        "\n\n".join(
            [_shares(sources), _removed(sources), _lengths(sources), *_scores(sources), _samples(sources)]
        )
        + "\n"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    rule = "|---|" + "---:|" * (len(heads) - 1)
    return "\n".join([line(heads), rule, *map(line, rows)])


def _shares(sources: Sequence[Source]) -> str:
    total = sum(source.total("tokens") for source in sources)
    rows = [
        [
            source.name,
            f"{source.total('documents'):,}",
            f"{source.total('bytes'):,}",
            f"{source.total('tokens'):,}",
            f"{source.total('tokens') / total:.1%}",
            f"{source.total('bytes') / source.total('tokens'):.2f}",
            f"{source.total('documents') / max(1, source.manifest['read']['documents']):.1%}",
        ]
        for source in sources
    ]
    return _table(
        [
            "source",
            "documents",
            "bytes",
            "tokens",
            "share of tokens",
            "bytes/token",
            "documents kept of those read",
        ],
        rows,
    )


def _removed(sources: Sequence[Source]) -> str:
    rows: list[list[object]] = []
    for source in sources:
        read = source.manifest["read"]
        rows += [
            [source.name, key.replace("_", " "), f"{read[key]:,}", ""]
            for key in ("empty_skipped", "too_long_skipped")
            if read[key]
        ]
        rows += [
            [source.name, reason.replace("_", " "), f"{count['documents']:,}", f"{count['bytes']:,}"]
            for reason, count in source.manifest["cleaning"]["removed"].items()
        ]
    return _table(["source", "left out", "documents", "bytes"], rows) if rows else "Nothing was left out."


def _lengths(sources: Sequence[Source]) -> str:
    first, last = used_bins(sources)
    rows = []
    for i in range(first, last + 1):
        counts = [f"{source.lengths[i]:,}" for source in sources]
        rows.append([f"{LENGTHS[i]:,}–{LENGTHS[i + 1] - 1:,}", *counts])
    return _table(["tokens in a document", *(source.name for source in sources)], rows)


def _scores(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        if source.scored:
            cut = source.manifest["cleaning"]["filter"]
            bins = zip(
                source.low_scores.reshape(10, 4).sum(1), source.kept_scores.reshape(10, 4).sum(1), strict=True
            )
            rows = [
                [f"{i / 10:.1f}–{(i + 1) / 10:.1f}", f"{low:,}", f"{kept:,}"]
                for i, (low, kept) in enumerate(bins)
            ]
            heading = (
                f"{source.name}: {cut['kept']:,} of {cut['scored']:,} documents kept, from a score of "
                f"{cut['threshold']:.3f} on"
            )
            yield heading + "\n\n" + _table(["score", "removed", "kept"], rows)


def _samples(sources: Sequence[Source]) -> str:
    parts = []
    for source in sources:
        for sample in source.samples:
            score = "" if sample.score is None else f", score {sample.score:.3f}"
            text = "\n".join(f"    {line}" for line in sample.text.splitlines())
            parts.append(
                f"{source.name}, {sample.split}: {sample.document} ({sample.tokens:,} "
                f"tokens{score})\n\n{text}"
            )
    return "\n\n".join(parts)
