"""Sources of the rows of a run: a pure function of the row's number, exact, and the same for every world size
and restart.

A source with weight w has had ⌊n · w⌋ of the first n rows: its turns lie as evenly as they can (a balanced,
or Sturmian, sequence). With several sources the first takes its turns so, the second out of the rows that are
left, and so on. Counting is exact rational arithmetic on one index at a time, so that nothing is accumulated
and nothing is in memory: after any n rows, each source is within (number of sources) rows of n · w, and a
phase given in passes ends with exactly the windows asked for. Which window a turn reads is
train/data/batches.py's: epochs of a keyed permutation, one after another, so that every window is read once
before any is read twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.train.data.settings import DataSettings, MixtureSettings, PhaseSettings, SourceSettings
from outgrow.train.data.shards import TokenData, TokenSplit, read_manifest

FOREVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Share:
    """The rows of a batch that one source fills."""

    split: TokenSplit
    key: int  # of the source: its windows come in an order of its own
    rows: np.ndarray  # places in the batch, int64 (r,)
    # which of the source's turns each row is, counted from the start of the run, int64 (r,)
    draws: np.ndarray


@dataclass(frozen=True)
class Phase:
    """Rows [start, stop) of the run; `stop` is None where it never ends."""

    start: int
    stop: int | None
    weights: Mapping[str, Fraction]  # together 1, largest first
    before: Mapping[str, int]  # turns that each source has had before `start`

    def turns(self, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Per source the positions in `rows` that are its turns, and which turns they are. `rows`: numbers of
        rows of this phase, (r,)."""
        left = rows - self.start
        positions = np.arange(len(rows))
        remaining = Fraction(1)
        for name, weight in self.weights.items():
            had, its = _taken(left, weight / remaining)
            draws = had[its] + self.before.get(name, 0)
            yield name, positions[its], draws
            left = (left - had)[~its]
            positions = positions[~its]
            remaining -= weight

    def counts(self, rows: int) -> dict[str, int]:
        """The number of the phase's first `rows` rows that each source fills."""
        turns, remaining = {}, Fraction(1)
        for name, weight in self.weights.items():
            turns[name] = rows * weight // remaining
            rows = rows - turns[name]
            remaining = remaining - weight
        return turns


def _taken(index: np.ndarray, share: Fraction) -> tuple[np.ndarray, np.ndarray]:
    """The number of rows before each `index` that have been taken; and whether this one is."""
    numerator = share.numerator
    denominator = share.denominator
    count = int(index.max(initial=0)) + 1
    if count * numerator >= 2**63:  # where the product needs more than 64 bits
        index = index.astype(object)
    had = index * numerator // denominator
    then = (index + 1) * numerator // denominator
    is_taken = then > had
    return had.astype(np.int64), is_taken.astype(bool)


@dataclass(frozen=True)
class Mixture:
    """Several sources as one endless training split."""

    splits: Mapping[str, TokenSplit]
    phases: tuple[Phase, ...]
    context: int
    name: str = "train"

    @property
    def count(self) -> int:
        """Tokens of all sources, each counted once."""
        return sum(split.count for split in self.splits.values())

    def shares(self, index: np.ndarray) -> Iterator[Share]:
        """The source that fills each row of numbers `index` (r,) of the run, and with which of its turns.

        Raises:
            UserError: the last phase ends before.
        """
        for phase in self.phases:
            stop = FOREVER if phase.stop is None else phase.stop
            in_phase = (index >= phase.start) & (index < stop)
            positions = np.flatnonzero(in_phase)
            for name, rows, draws in phase.turns(index[positions]):
                if len(rows):
                    split = self.splits[name]
                    key = source_key(name)
                    yield Share(split, key, positions[rows], draws)
        end = self.phases[-1].stop
        if end is not None and (index >= end).any():
            rows_read = int(index.max()) + 1
            raise _over(end, rows_read, self.context)

    def counts(self, rows: int) -> dict[str, int]:
        """The number of the first `rows` rows of the run that each source fills."""
        turns = dict.fromkeys(self.splits, 0)
        for phase in self.phases:
            stop = rows
            if phase.stop is not None:
                stop = min(rows, phase.stop)
            length = max(0, stop - phase.start)
            for name, count in phase.counts(length).items():
                turns[name] += count
        return turns


def tokens_read(split: TokenSplit | Mixture, name: str, rows: int, context: int) -> dict[str, int]:
    """The number of tokens that a run of `rows` windows is trained on from each source; `name` is that of a
    split that is no mixture."""
    counts = split.counts(rows) if isinstance(split, Mixture) else {name: rows}
    return {source: count * context for source, count in counts.items()}


def source_key(name: str) -> int:
    """A number that stands for the source in the key of its permutations."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# ---- opening -----------------------------------------------------------------------------------------------


def mix(settings: MixtureSettings, splits: Mapping[str, TokenSplit], *, context: int, rows: int) -> Mixture:
    """The mixture of `splits` as `settings` say, checked against a run of `rows` windows of `context` tokens.

    Raises:
        UserError: a source has not one window or ends early, or the phases do, each with what there is and
        what is asked for.
    """
    windows: dict[str, int] = {}
    faults = []
    for name, split in splits.items():
        windows[name] = max(0, split.count - 1) // context
        if not windows[name]:
            faults.append(
                f"mixture.sources.{name}: its training part has {split.count} tokens, less than one "
                f"window of {context} + 1; give more text"
            )
    UserError.collect(faults)
    phases: list[Phase] = []
    for phase in settings.phases:
        last = phases[-1] if phases else None
        phases.append(_phase(phase, windows, context, rows, last))
    mixture = Mixture(splits, tuple(phases), context)
    end = phases[-1].stop
    if end is not None and end < rows:
        raise _over(end, rows, context)
    _check_passes(settings, mixture, windows, rows)
    return mixture


def _phase(
    settings: PhaseSettings, windows: Mapping[str, int], context: int, rows: int, last: Phase | None
) -> Phase:
    """The phase that begins where the phase `last` ends.

    Args:
        windows: of each source.
        rows: of the whole run.

    Raises:
        UserError: passes of a source are less than one window.
    """
    start = 0
    before: dict[str, int] = {}
    if last is not None:
        assert last.stop is not None
        start = last.stop
        counts = last.counts(last.stop - last.start)
        for name in windows:
            earlier = last.before.get(name, 0)
            before[name] = earlier + counts.get(name, 0)
    if settings.passes is not None:
        parts = _windows_of(settings.passes, windows)
        length: int | None = int(sum(parts.values()))
    else:
        assert settings.weights is not None
        weighted = settings.weights.items()
        parts = {name: Fraction(str(weight)) for name, weight in weighted}
        length = _length(settings, context, rows)
    total = sum(parts.values())  # divided by it, parts are exactly 1 together, where 1e-9 was missing
    weights = {name: part / total for name, part in parts.items()}

    def rank(name: str) -> tuple[Fraction, str]:
        return -weights[name], name

    names = sorted(weights, key=rank)
    ordered = {name: weights[name] for name in names}
    stop = None if length is None else start + length
    return Phase(start, stop, ordered, before)


def _windows_of(passes: Mapping[str, float], windows: Mapping[str, int]) -> dict[str, Fraction]:
    """The windows that so many passes over each source read.

    Raises:
        UserError: less than one.
    """
    counts: dict[str, Fraction] = {}
    faults = []
    for name, count in passes.items():
        exact = Fraction(str(count)) * windows[name]
        counts[name] = Fraction(round(exact))
        if not counts[name]:
            faults.append(
                f"mixture.phases: passes of {name}: {count:g} × {windows[name]} windows is "
                "less than one window; raise it"
            )
    UserError.collect(faults)
    return counts


def _length(settings: PhaseSettings, context: int, rows: int) -> int | None:
    """The rows of a phase with weights: a share of the run's `rows` or its tokens; None where it never
    ends."""
    if settings.share is not None:
        exact = Fraction(str(settings.share)) * rows
        return max(1, round(exact))
    if settings.tokens is not None:
        return max(1, round(settings.tokens / context))
    return None


def _check_passes(settings: MixtureSettings, mixture: Mixture, windows: Mapping[str, int], rows: int) -> None:
    """Refuse a run of `rows` windows that reads a source more often than its max_passes."""
    faults = []
    for name, count in mixture.counts(rows).items():
        most = settings.sources[name].max_passes
        if most is not None and count > most * windows[name]:
            needed = f"{count * mixture.context:,}"
            tokens = windows[name] * mixture.context
            faults.append(
                f"mixture.sources.{name}: it ends early: the run asks for {needed} of "
                f"its tokens, and it has {tokens:,} × max_passes={most:g}; lower "
                "its weight or train.budget_tokens, allow more passes, or give more text"
            )
    UserError.collect(faults)


def _over(end: int, rows: int, context: int) -> UserError:
    return UserError(
        f"mixture: its phases end after {end * context:,} tokens, and the run reads {rows * context:,}; "
        "lower train.budget_tokens, lengthen the last phase, or leave out its tokens"
    )


def mixed(
    settings: MixtureSettings | None,
    own: DataSettings,
    data: TokenData,
    prepare: Callable[[DataSettings], TokenData],
    *,
    context: int,
    rows: int,
) -> TokenData:
    """`data`, prepared from the settings `own`, with the mixture as its training part; as it is where there
    is none.

    Every source is cut by the tokenizer of `data`; only training parts are read. The fingerprint tells the
    sources' texts, and how much of each is read when: other weights are another text. Raises UserError as
    `prepare` and `mix` do.
    """
    if settings is None:
        return data
    texts: dict[str, DataSettings] = {}
    for name, source in settings.sources.items():
        text = source_data(source, own, data)
        if text is not None:
            texts[name] = text
    separate = apart(texts)
    prepared = {name: prepare(text) for name, text in separate.items()}

    splits: dict[str, TokenSplit] = {}
    parts = [data.fingerprint]
    for name in settings.sources:
        opened = prepared.get(name, data)
        assert isinstance(opened.train, TokenSplit)
        splits[name] = opened.train
        parts.append(f"{name} {opened.fingerprint}")
    for phase in settings.phases:
        entries = _phase_entries(phase)
        parts.append(json.dumps(entries, sort_keys=True))
    record = "\n".join(parts)
    fingerprint = hashlib.sha256(record.encode()).hexdigest()
    mixture = mix(settings, splits, context=context, rows=rows)
    return replace(data, train=mixture, fingerprint=fingerprint)  # type: ignore[arg-type]


def _phase_entries(phase: PhaseSettings) -> dict[str, Any]:
    """A phase for the fingerprint; a share that is not given is left out, as it was before there were any."""
    entries = asdict(phase)
    if entries["share"] is None:
        del entries["share"]
    return entries


def apart(sources: Mapping[str, DataSettings]) -> dict[str, DataSettings]:
    """The sources, each in a folder of its own: two of one leaf that ask for other text would build theirs in
    turns."""
    first: dict[str, DataSettings] = {}
    separate: dict[str, DataSettings] = {}
    for name, source in sources.items():
        home = str(source.home)
        is_twice = first.setdefault(home, source) != source
        if is_twice:
            source = replace(source, folder=f"{home}-{name}")
        separate[name] = source
    return separate


def source_data(source: SourceSettings, own: DataSettings, data: TokenData) -> DataSettings | None:
    """The text to prepare for a source; None where it is `own`, which is there. A folder for each tokenizer,
    so that none replaces another's."""
    not_of_the_text = (
        "tokenizer",
        "name",
        "folder",
        "vocab_size",
        "model_max_length",
        "shard_tokens",
        "workers",
    )
    beside = {name: getattr(own, name) for name in not_of_the_text}
    if replace(source.data, **beside) == own:
        return None
    if source.data.tokenizer is not None:
        return source.data
    manifest = read_manifest(data.folder)
    assert manifest is not None
    home = source.data.home
    digest = manifest["tokenizer"]["sha256"]
    folder = home.with_name(f"{home.name}-{digest[:8]}")
    tokenizer = str(data.tokenizer_folder)
    return replace(source.data, tokenizer=tokenizer, folder=str(folder))
