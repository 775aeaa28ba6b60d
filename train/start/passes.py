"""How often a run reads its text, from manifests and limits alone: no token is read, nothing is built."""

from __future__ import annotations

from collections.abc import Iterator

from outgrow.train.data.settings import DataSettings, MixtureSettings
from outgrow.train.data.shards import read_manifest
from outgrow.train.settings import Budget, Settings


def passes(settings: Settings) -> Iterator[str]:
    """One line for each text that the run is trained on: its tokens, and how often they are read.

    Tokens that are there are counted in their manifest; of a text that is not prepared yet, `limit_tokens` is what is known.
    """
    budget = Budget.of(settings.train)
    tokens = budget.steps * budget.tokens_per_step
    if settings.mixture is None:
        yield _line(settings.data.name, tokens, training_tokens(settings.data))
        return
    for name, share in shares(settings.mixture, tokens).items():
        source = settings.mixture.sources[name].data
        yield _line(name, share, training_tokens(source))


def _line(name: str, read: float | None, there: int | None) -> str:
    if read is None:
        return f"{name}: as often as its phase's passes say"
    if there is None:
        return f"{name}: {read:,.0f} tokens; how often it is read is known once it is prepared (outgrow corpus prepare)"
    times = read / there
    warning = "; more than 4 passes teach little that is new (arXiv 2305.16264)" if times > 4 else ""
    return f"{name}: {read:,.0f} of {there:,} training tokens, {times:.2f} passes{warning}"


def training_tokens(data: DataSettings) -> int | None:
    """The tokens of the training part; None where nobody knows yet."""
    homes = [data.home, *sorted(data.home.parent.glob(f"{data.home.name}-????????"))]  # the latter are cut by a source's tokenizer
    for home in homes:
        if home.is_dir() and (manifest := read_manifest(home)) is not None:
            return int(manifest["splits"]["train"]["tokens"])
    return None if data.limit_tokens is None else round(data.limit_tokens * (1 - data.validation_fraction))


def shares(mixture: MixtureSettings, tokens: int) -> dict[str, float | None]:
    """The tokens of each source in a run of so many; None where a phase says in passes how long it is."""
    read: dict[str, float | None] = dict.fromkeys(mixture.sources, 0.0)
    left = float(tokens)
    for phase in mixture.phases:
        length = left if phase.tokens is None else min(left, phase.tokens)
        for name in phase.passes or ():
            read[name] = None
        for name, weight in (phase.weights or {}).items():
            before = read[name]
            read[name] = None if before is None else before + weight * length
        left -= length if phase.weights else 0.0
    return read
