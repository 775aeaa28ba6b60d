"""A survey of prepared folders: shares, lengths, filter scores, samples. Documents are read in batches, so
memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
        """Check whether a filter was at work."""
        return bool(self.kept_scores.any() or self.low_scores.any())

    def total(self, what: str) -> int:
        """Documents, bytes or tokens of both splits."""
        splits = self.manifest["splits"].values()
        return sum(split[what] for split in splits)


def inspect(folder: Path, *, samples: int, characters: int, seed: int) -> Source:
    """Count the documents of a prepared folder, and draw `samples` of each split.

    Raises:
        UserError: there is none, it is damaged, or it was prepared before documents were listed.
    """
    data = open_data(folder)
    manifest = read_manifest(folder)
    assert manifest is not None
    listing = folder / LISTING
    if not listing.is_file():
        way_out = "prepare it again"
        if manifest["settings"].get("corpus") == "tokens":
            way_out = "tokens that others made have no list of documents"
        raise UserError(f"{folder}: no {LISTING} in it; {way_out}")
    numbers = np.random.default_rng(seed)
    lotteries = []
    for split in SPLITS:
        count = manifest["splits"][split]["documents"]
        chosen = numbers.choice(count, min(samples, count), replace=False)
        lotteries.append(_Lottery(split, np.sort(chosen)))
    lengths = np.zeros(len(LENGTHS) - 1, np.int64)
    scores = np.zeros(len(SCORES) - 1, np.int64)
    for part in _batches(listing):
        score = part["score"]
        is_scored = ~np.isnan(score)
        lengths += _histogram(part["tokens"], LENGTHS)
        scores += _histogram(score[is_scored], SCORES)
        for lottery in lotteries:
            lottery.pass_by(part)
    drawn: list[Sample] = []
    for lottery in lotteries:
        drawn += [_sample(data, lottery.split, row, end, characters) for row, end in lottery.drawn]
    low_scores = _low_scores(folder / REMOVED)
    return Source(folder.name, manifest, lengths, scores, low_scores, tuple(drawn))


@dataclass
class _Lottery:
    """The documents of a split that are drawn, as the list of documents passes by, part by part.

    Attributes:
        numbers: of these documents, in order.
        drawn: the row of each in the list, and where its tokens end.
        documents, tokens: how many the earlier parts of the list have.
    """

    split: str
    numbers: np.ndarray
    drawn: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0

    def pass_by(self, part: dict[str, np.ndarray]) -> None:
        """Draw what lies in the next part of the list."""
        rows = np.flatnonzero(part["split"] == self.split)
        count = len(rows)
        if count == 0:
            return
        lengths = part["tokens"][rows]
        ends = self.tokens + np.cumsum(lengths)
        positions = self.numbers - self.documents
        is_here = (positions >= 0) & (positions < count)
        for position in positions[is_here]:
            row = rows[position]
            end = int(ends[position])
            document = {key: column[row] for key, column in part.items()}
            self.drawn.append((document, end))
        self.documents += count
        self.tokens = int(ends[-1])


def _histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    counts, _ = np.histogram(values, edges)
    return counts


def _batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    import pyarrow.parquet

    names = ("document", "split", "tokens", "score")
    with pyarrow.parquet.ParquetFile(path) as file:
        for part in file.iter_batches(batch_size=BATCH):
            columns = {name: part.column(name).to_numpy(zero_copy_only=False) for name in names}
            score = columns["score"]
            yield columns | {"score": score.astype(np.float32)}


def _sample(data: TokenData, split: str, row: dict[str, Any], end: int, characters: int) -> Sample:
    """The document of a row of the list, whose tokens end at `end` of its split."""
    from tokenizers import Tokenizer

    tokens = int(row["tokens"])
    begin = end - tokens
    of_split = getattr(data, split).tokens
    ids = of_split[begin : end - 1]  # without its end of text
    tokenizer_file = data.tokenizer_folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    first = ids[: 4 * characters]
    text = tokenizer.decode(first.tolist(), skip_special_tokens=False)
    score = float(row["score"])
    kept_score = None if np.isnan(score) else score
    name = str(row["document"])
    shown = text[:characters]
    return Sample(name, split, tokens, kept_score, shown)


def _low_scores(path: Path) -> np.ndarray:
    import pyarrow.compute
    import pyarrow.parquet

    histogram = np.zeros(len(SCORES) - 1, np.int64)
    with pyarrow.parquet.ParquetFile(path) as file:
        for part in file.iter_batches(batch_size=BATCH, columns=["reason", "detail"]):
            is_low = pyarrow.compute.equal(part.column("reason"), "low_score")
            low = part.filter(is_low)
            details = low.column("detail").to_numpy(zero_copy_only=False)
            scores = details.astype(np.float64)
            histogram += _histogram(scores, SCORES)
    return histogram


def used_bins(sources: Sequence[Source]) -> tuple[int, int]:
    """The first and the last bin of LENGTHS that holds a document."""
    lengths = np.sum([source.lengths for source in sources], axis=0)
    used = np.flatnonzero(lengths)
    return int(used[0]), int(used[-1])


# ---- as text -----------------------------------------------------------------------------------------------


def report(sources: Sequence[Source]) -> str:
    """Tables in Markdown: what each source holds and what was left out of it, how long its documents are,
    what they scored; samples."""
    parts = [_shares(sources), _removed(sources), _lengths(sources)]
    parts += _scores(sources)
    parts.append(_samples(sources))
    return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        words = map(str, cells)
        return f"| {' | '.join(words)} |"

    numbers = len(heads) - 1
    rule = "|---|" + "---:|" * numbers
    lines = [line(heads), rule, *map(line, rows)]
    return "\n".join(lines)


def _shares(sources: Sequence[Source]) -> str:
    """The size of each source, and its share of all."""
    total = sum(source.total("tokens") for source in sources)
    rows = []
    for source in sources:
        documents = source.total("documents")
        size = source.total("bytes")
        tokens = source.total("tokens")
        read = max(1, source.manifest["read"]["documents"])
        row = [
            source.name,
            f"{documents:,}",
            f"{size:,}",
            f"{tokens:,}",
            f"{tokens / total:.1%}",
            f"{size / tokens:.2f}",
            f"{documents / read:.1%}",
        ]
        rows.append(row)
    heads = [
        "source",
        "documents",
        "bytes",
        "tokens",
        "share of tokens",
        "bytes/token",
        "documents kept of those read",
    ]
    return _table(heads, rows)


def _removed(sources: Sequence[Source]) -> str:
    """The documents that were left out, by reason."""
    rows: list[list[object]] = []
    for source in sources:
        read = source.manifest["read"]
        for key, count in read.items():
            if key.endswith("_skipped") and count:
                reason = key.replace("_", " ")
                rows.append([source.name, reason, f"{count:,}", ""])
        removed = source.manifest["cleaning"]["removed"]
        for key, counts in removed.items():
            reason = key.replace("_", " ")
            documents = f"{counts['documents']:,}"
            size = f"{counts['bytes']:,}"
            rows.append([source.name, reason, documents, size])
    if not rows:
        return "Nothing was left out."
    return _table(["source", "left out", "documents", "bytes"], rows)


def _lengths(sources: Sequence[Source]) -> str:
    """The number of documents of each length."""
    first, last = used_bins(sources)
    rows = []
    for i in range(first, last + 1):
        shortest = LENGTHS[i]
        longest = LENGTHS[i + 1] - 1
        counts = [f"{source.lengths[i]:,}" for source in sources]
        bounds = f"{shortest:,}–{longest:,}"
        rows.append([bounds, *counts])
    names = [source.name for source in sources]
    return _table(["tokens in a document", *names], rows)


def _scores(sources: Sequence[Source]) -> Iterator[str]:
    """A table of each source that a filter scored: documents removed and kept, by tenths of the score."""
    for source in filter(_is_scored, sources):
        cut = source.manifest["cleaning"]["filter"]
        low_tenths = source.low_scores.reshape(10, 4).sum(1)
        kept_tenths = source.kept_scores.reshape(10, 4).sum(1)
        rows = []
        for i in range(10):
            least = i / 10
            most = (i + 1) / 10
            low = low_tenths[i]
            kept_count = kept_tenths[i]
            bounds = f"{least:.1f}–{most:.1f}"
            rows.append([bounds, f"{low:,}", f"{kept_count:,}"])
        heading = (
            f"{source.name}: {cut['kept']:,} of {cut['scored']:,} documents kept, from a score of "
            f"{cut['threshold']:.3f} on"
        )
        table = _table(["score", "removed", "kept"], rows)
        yield f"{heading}\n\n{table}"


def _is_scored(source: Source) -> bool:
    return source.scored


def _samples(sources: Sequence[Source]) -> str:
    """The samples of all sources, each under a line that names its document."""
    parts = []
    for source in sources:
        for sample in source.samples:
            score = "" if sample.score is None else f", score {sample.score:.3f}"
            size = f"{sample.tokens:,} tokens"
            lines = [f"    {line}" for line in sample.text.splitlines()]
            text = "\n".join(lines)
            split = f"{source.name}, {sample.split}"
            heading = f"{split}: {sample.document} ({size}{score})"
            parts.append(f"{heading}\n\n{text}")
    return "\n\n".join(parts)
