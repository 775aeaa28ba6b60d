"""Count how often a run reads its text (epochs), from manifests and limits alone: no token is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outgrow.model.base.errors import UserError
from outgrow.train.data.settings import DataSettings, MixtureSettings
from outgrow.train.data.shards import read_manifest
from outgrow.train.settings import Settings

OFTEN = 4  # passes, after which more of them teach little that is new (arXiv 2305.16264)


@dataclass(frozen=True)
class Stock:
    """The training tokens of a text; `exact` where they are there and counted, else no more than so many."""

    tokens: int
    exact: bool


def passes(settings: Settings) -> Iterator[str]:
    """One line for each text that the run is trained on: its share of the run, its tokens, and how often they
    are read.

    Tokens that are there are counted in their manifest; of a text that is not prepared yet, `limit_tokens` is
    what is known.
    """
    budget = settings.budget
    tokens = budget.steps * budget.tokens_per_step
    if settings.mixture is None:
        yield _line(settings.data.name, tokens, tokens, stock(settings.data), None)
        return
    sources = settings.mixture.sources
    stocks = {name: stock(source.data) for name, source in sources.items()}
    tokens_read = shares(settings.mixture, tokens, stocks)
    for name, read in tokens_read.items():
        most = sources[name].max_passes
        yield _line(name, read, tokens, stocks[name], most)


def _line(name: str, read: float | None, run: int, there: Stock | None, most: float | None) -> str:
    if read is None:
        return (
            f"{name}: as often as its phase's passes say, of tokens that are counted once they are prepared"
        )
    share = read / run
    start = f"{name}: {share:.1%} of the run, {read:,.0f} tokens"
    if there is None:
        return f"{start}; how often it is read is known once it is prepared (outgrow corpus prepare)"
    times = read / there.tokens
    of = "of"
    many = f"{times:.2f}"
    if not there.exact:
        of = "of at most"
        many = f"at least {times:.2f}"
    warning = _warning(times, most)
    return f"{start} {of} {there.tokens:,}, {many} passes{warning}"


def _warning(times: float, most: float | None) -> str:
    if most is not None and times > most:
        return (
            f"; it is too small: max_passes={most:g} refuses the run; give more of it, lower its weight or "
            "train.budget_tokens"
        )
    if times > OFTEN:
        return f"; more than {OFTEN} passes teach little that is new (arXiv 2305.16264)"
    return ""


def prepared(home: Path) -> list[Path]:
    """The folders of tokens that a text has been cut into, first by its own tokenizer, then by sources'."""
    by_sources = sorted(home.parent.glob(f"{home.name}-????????"))
    folders = filter(Path.is_dir, [home, *by_sources])
    return [folder for folder in folders if read_manifest(folder) is not None]


def stock(data: DataSettings) -> Stock | None:
    """The tokens of the training part; None where nobody knows yet."""
    for folder in prepared(data.home):
        manifest = read_manifest(folder)
        assert manifest is not None
        if _is_of_another_text(manifest, data):
            continue
        tokens = int(manifest["splits"]["train"]["tokens"])
        return Stock(tokens, True)
    if data.limit_tokens is None:
        return None
    tokens = round(data.limit_tokens * (1 - data.validation_fraction))
    return Stock(tokens, False)


def shares(
    mixture: MixtureSettings, tokens: int, stocks: Mapping[str, Stock | None]
) -> dict[str, float | None]:
    """The tokens of each source in a run of so many; None where a phase gives passes of a text whose tokens
    are not known."""
    read: dict[str, float | None] = dict.fromkeys(mixture.sources, 0.0)
    left = float(tokens)
    for phase in mixture.phases:
        by_name: dict[str, float | None] = {}
        if phase.passes is not None:
            for name, times in phase.passes.items():
                text = stocks[name]
                by_name[name] = times * text.tokens if text else None
        else:
            length: float = left if phase.tokens is None else phase.tokens
            if phase.share is not None:
                length = phase.share * tokens
            length = min(left, length)
            weights = phase.weights or {}
            by_name = {name: weight * length for name, weight in weights.items()}
        for name, more in by_name.items():
            before = read[name]
            read[name] = None if before is None or more is None else before + more
        total = sum(more or 0.0 for more in by_name.values())
        left = max(0.0, left - total)
    return read


def _is_of_another_text(manifest: Mapping[str, Any], data: DataSettings) -> bool:
    """Check for tokens of other files than are named now: another data.path, or files that changed."""
    from outgrow.train.corpus.read.corpora import open_corpus

    inputs = manifest.get("inputs")  # a folder of tokens alone tells of no text
    if data.corpus != "files" or inputs is None:
        return False
    try:
        return bool(open_corpus(data).stamp() != inputs["stamp"])
    except UserError:  # no text lies there, which a run tells
        return False
