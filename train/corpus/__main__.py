"""Turn text into token shards.

outgrow corpus prepare data=stdlib
outgrow corpus prepare data=files 'data.path=texts/**/*.jsonl.zst' data.clean.normalise=true
data.clean.exact_duplicates=true
outgrow corpus label data=stdlib                                            demonstration labels, from stated
                                                                            rules
outgrow corpus fit data=stdlib encoder=runs/tiny_source-scratch-s0/final    the filter of phi-1, from a file
                                                                            of labels
outgrow corpus score data=stdlib
outgrow corpus prepare data=stdlib data.clean.filter=filters/stdlib data.clean.keep=0.5
outgrow corpus write model=Qwen/Qwen2.5-7B-Instruct server=http://127.0.0.1:8000/v1
    (texts by a language model: conf/write.yaml)
outgrow corpus inspect 'folders=[data/stdlib]' out=inspection                samples, shares, lengths, scores:
                                                                             a table and a picture

--config-dir DIR adds leaves of your own: DIR/data/mine.yaml is data=mine, DIR/prompts/mine.yaml prompts=mine.
A stopped or killed preparation goes on where it was. Exit status: 0 done, 2 a fault in what was asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from outgrow.model.base.compose import CONF, compose_config
from outgrow.model.base.errors import UserError, unknown
from outgrow.model.base.interrupt import started
from outgrow.model.base.overrides import own_folder
from outgrow.model.base.settings import settings_of
from outgrow.train.corpus import report
from outgrow.train.corpus.settings import ExecutorSettings, executor_faults
from outgrow.train.data.settings import DataSettings, disagreements

T = TypeVar("T")


@dataclass(frozen=True)
class PrepareSettings:
    """conf/prepare.yaml."""

    data: DataSettings
    corpus: ExecutorSettings
    progress: bool


@dataclass(frozen=True)
class FilterSettings:
    """conf/filter.yaml: of label, fit and score."""

    data: DataSettings
    labels: str
    filter: str
    scores: str
    encoder: str | None
    revision: str | None
    max_tokens: int
    trees: int
    min_samples_leaf: int
    held_out: float
    seed: int
    progress: bool


@dataclass(frozen=True)
class InspectSettings:
    """conf/inspect.yaml."""

    folders: tuple[str, ...]
    out: str | None
    samples: int
    characters: int
    seed: int
    check: bool


def settings_from(cls: type[T], name: str, overrides: Sequence[str], own: Path | None = None) -> T:
    """conf/<name>.yaml under `key=value` overrides, as the dataclass `cls`.

    Raises:
        UserError: every unknown, missing and mistyped key, and data settings that cannot work, at once.
    """
    cfg, faults = compose_config(CONF, name, list(overrides), own)
    return settings_of(cls, cfg, faults, _disagreements)


def _disagreements(settings: Any) -> Iterator[str]:
    """Yield the faults between well-typed values, of whichever command."""
    if isinstance(settings, PrepareSettings | FilterSettings):
        yield from disagreements(settings.data)
    if isinstance(settings, PrepareSettings):
        yield from executor_faults(settings.corpus)
    if isinstance(settings, InspectSettings):
        if not settings.folders:
            yield "folders: none; give prepared folders: 'folders=[data/stdlib]'"
        for key in ("samples", "characters"):
            if getattr(settings, key) < 0:
                yield f"{key}: must not be negative"
    if isinstance(settings, FilterSettings):
        for key in ("max_tokens", "trees", "min_samples_leaf"):
            if getattr(settings, key) <= 0:
                yield f"{key}: must be positive"
        if not 0 < settings.held_out < 1:
            yield f"held_out: must be a share between 0 and 1; found {settings.held_out}"


# ---- commands ----------------------------------------------------------------------------------------------


def prepare(overrides: Sequence[str], own: Path | None) -> None:
    """Prepare one corpus, and say what became of its documents."""
    from outgrow.train.corpus.build import prepare as build

    settings = settings_from(PrepareSettings, "prepare", overrides, own)
    data = build(settings.data, progress=settings.progress, executor=settings.corpus)
    print(report.prepared(data.folder))


def label(overrides: Sequence[str], own: Path | None) -> None:
    """Label a corpus of Python modules by the demonstration rules."""
    from outgrow.train.corpus.filter.fit import write_labels
    from outgrow.train.corpus.filter.rules import RULES

    settings = settings_from(FilterSettings, "filter", overrides, own)
    counts = write_labels(settings.data, Path(settings.labels))
    print(
        f"{settings.labels}: {counts[1]} documents labelled 1, {counts[0]} labelled 0. Demonstration "
        "labels; 1 is where every rule holds:"
    )
    print("\n".join(f"  {rule}" for rule in RULES))


def fit(overrides: Sequence[str], own: Path | None) -> None:
    """Fit a filter on labels, and say how it does on those held out."""
    from outgrow.train.corpus.filter.fit import FitSettings
    from outgrow.train.corpus.filter.fit import fit as fit_filter

    settings = settings_from(FilterSettings, "filter", overrides, own)
    if settings.encoder is None:
        raise UserError(
            "encoder: missing; give the source checkpoint's folder, or any encoder of the Hugging Face "
            "hub: encoder=owner/name"
        )
    keys = FitSettings.__dataclass_fields__
    chosen = FitSettings(**{key: getattr(settings, key) for key in keys})
    labels = Path(settings.labels)
    folder = Path(settings.filter)
    card = fit_filter(chosen, settings.data, labels, folder)
    print(report.fitted(settings.filter, card))


def score(overrides: Sequence[str], own: Path | None) -> None:
    """Score the documents of a corpus, kept or not."""
    from outgrow.train.corpus.filter.score import Filter, write_scores
    from outgrow.train.corpus.progress import bar
    from outgrow.train.corpus.read.corpora import documents, open_corpus

    settings = settings_from(FilterSettings, "filter", overrides, own)
    corpus = open_corpus(settings.data)
    fitted = Filter(Path(settings.filter).expanduser(), settings.encoder)
    with bar("scoring", getattr(corpus, "size", None), settings.progress) as advance:
        every = documents(settings.data, corpus)
        histogram = write_scores(every, fitted, Path(settings.scores), advance)
    print(report.scored(settings.scores, histogram))


def write(overrides: Sequence[str], own: Path | None) -> None:
    """Have a language model write documents, and say what they cost."""
    from outgrow.train.corpus.writing.run import write as run
    from outgrow.train.corpus.writing.settings import settings_from as write_settings

    print(run(write_settings(overrides, own)))


def inspect(overrides: Sequence[str], own: Path | None) -> None:
    """Show what prepared folders hold."""
    from outgrow.model.base.files import write_text
    from outgrow.train.corpus import inspect as module
    from outgrow.train.corpus.picture import draw
    from outgrow.train.corpus.progress import bar
    from outgrow.train.data.shards import check_data
    from outgrow.train.run.beside import check_beside

    settings = settings_from(InspectSettings, "inspect", overrides, own)
    out = None if settings.out is None else Path(settings.out)
    if out is not None:
        check_beside(out, "out=DIR")
    sources = []
    for folder in map(Path, settings.folders):
        if settings.check:
            with bar(f"checking {folder.name}", None, True) as advance:
                check_data(folder, advance)
        sources.append(
            module.inspect(
                folder, samples=settings.samples, characters=settings.characters, seed=settings.seed
            )
        )
    text = module.report(sources)
    if out is not None:
        write_text(out / "inspection.md", text)
        draw(sources, out / "inspection.png")
    print(text)


COMMANDS: dict[str, Callable[[Sequence[str], Path | None], None]] = {
    "prepare": prepare,
    "label": label,
    "fit": fit,
    "score": score,
    "inspect": inspect,
    "write": write,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The door: a UserError is one message on stderr and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or any(argument in ("-h", "--help") for argument in words):
        keys = "\n\n".join(
            (CONF / name).read_text()
            for name in ("prepare.yaml", "filter.yaml", "inspect.yaml", "data/base/all.yaml")
        )
        print(f"{__doc__}\nKeys and defaults:\n\n{keys}")
        return
    try:
        own, words = own_folder(words)
        command, *overrides = words or [""]
        if command not in COMMANDS:
            unknown("command", command, COMMANDS)
        COMMANDS[command](overrides, own)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    started()
    main()
