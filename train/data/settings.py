"""Settings of the text, its cleaning and its tokens. Plain values: nothing here imports a library."""

from __future__ import annotations

import glob
import hashlib
import re
from dataclasses import dataclass, field
from itertools import takewhile
from math import fsum
from operator import attrgetter
from pathlib import Path
from typing import Literal

from outgrow.model.base.errors import did_you_mean

LABEL = 32  # characters of a path, at most, in the name of the folder of its tokens


@dataclass(frozen=True)
class CleaningSettings:
    """The cleaning of documents: what is done to them, and which are left out, in this order; all of it off
    where nothing is said."""

    normalise: bool = False  # Unicode NFC, \n line ends, no control characters, no spaces at line ends
    exact_duplicates: bool = False  # remove later copies of a text
    # remove later texts of at least this Jaccard similarity; null: keep them
    near_duplicates: float | None = None
    words: Literal["prose", "code"] = "prose"  # what a word is in shingles: train/corpus/words.py
    # a folder or glob: remove texts that share 13 words in a row, or a short item, with one in it
    benchmarks: str | None = None
    filter: str | None = None  # the folder of a fitted filter: score what is left,
    keep: float | None = None  # and keep this share of it, the best documents
    # the folder of the filter's encoder; null: the one it had when the filter was fitted
    encoder: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """A corpus and its tokenizer; `conf/data/*.yaml` are its leaves. Fields of other corpora than the chosen
    one are not read."""

    name: str
    corpus: Literal["stdlib", "packages", "files", "hub", "exercises", "textbooks", "tokens", "prepared"]
    # where the tokens are kept; null: data/<name>; of a leaf that serves any path, data/<name>-<path>-<hash>
    folder: str | None = None
    # files: a folder, a file, or a glob (** crosses folders) of the suffixes in formats.READERS; or a URL
    # tokens: a folder, a file, or a glob of the suffixes in token_files.READERS
    # prepared: a folder that was made by `outgrow corpus prepare`
    path: str | None = None
    # tokens: those that are validated on; null: the end of each file, validation_fraction of it
    validation_path: str | None = None
    distributions: tuple[str, ...] = ()  # packages: name==version of each
    dataset: str | None = None  # hub: owner/name, or a folder that `datasets` can read
    config: str | None = None  # hub
    data_dir: str | None = None  # hub: a folder of the dataset
    split: str = "train"  # hub
    # hub: pin a commit or tag, for a moved branch is not noticed once the tokens are there
    revision: str | None = None
    streaming: bool = True  # hub: read over the network, without a copy on disk
    column: str = "text"  # of a parquet file or dataset; the field of a json or jsonl object
    limit_documents: int | None = None  # read no more than these; exercises, textbooks: make so many
    # of text: read no more; null: all, or READ_AHEAD for each token of limit_tokens
    limit_bytes: int | None = None
    # of both splits, after cleaning; the document that reaches it is the last
    limit_tokens: int | None = None
    # a longer document is skipped and counted: it has to fit in memory, with its tokens
    max_document_bytes: int = 2**24
    # the share of records that may be left out because they cannot be read; 0: none
    max_broken: float = 0.001
    clean: CleaningSettings = field(default_factory=CleaningSettings)
    # a folder or hub name; null: the one of the run's source, where it has none a byte-level BPE is trained
    tokenizer: str | None = None
    # of the trained one; data.tokenizer=train trains one even where the source has its own
    vocab_size: int = 2048
    model_max_length: int = 2048  # that the trained one states; a hint for its users, nothing is cut
    validation_fraction: float = 0.05  # of the documents, chosen by a hash of their text
    seed: int = 0  # of the split, and of what is generated
    shard_tokens: int = 2**28  # at most, in one file
    # processes; null: this one for a small corpus, else one a core. Nothing of the result depends on it
    workers: int | None = None

    @property
    def home(self) -> Path:
        """The folder that holds the tokens. The leaves `files` and `tokens` serve any path: each has its own
        there, so that no text replaces another's tokens."""
        if self.corpus == "prepared" and self.path:
            return Path(self.path).expanduser()
        if self.folder:
            return Path(self.folder).expanduser()
        serves_any_path = self.name == self.corpus
        if self.path is None or not serves_any_path:
            return Path(f"data/{self.name}").expanduser()
        label = re.sub(r"\W+", "-", self.path).strip("-")[-LABEL:]
        digest = hashlib.sha256(self.path.encode("utf-8", "surrogateescape")).hexdigest()
        return Path(f"data/{self.name}-{label}-{digest[:8]}").expanduser()


# bytes of text read for each token of limit_tokens: about twice what English or Python needs, the rest is for
# cleaning
READ_AHEAD = 8


def read_limit(settings: DataSettings) -> int | None:
    """The bytes of text that are read at most."""
    if settings.limit_bytes is None and settings.limit_tokens is not None:
        return READ_AHEAD * settings.limit_tokens
    return settings.limit_bytes


def disagreements(settings: DataSettings) -> list[str]:
    """List what is wrong between well-typed values, one line each."""
    faults = []
    if settings.corpus == "tokens":
        faults = _token_faults(settings)
    if settings.corpus == "prepared":
        faults = _prepared_faults(settings)
    if settings.corpus == "files" and not settings.path:
        faults.append(
            "data.path: missing; give a folder or a glob: data.path=texts or 'data.path=texts/**/*.md'"
        )
    unpinned = [name for name in settings.distributions if name.count("==") != 1]
    if settings.corpus == "packages" and (unpinned or not settings.distributions):
        faults.append(
            f"data.distributions: name each with its version, numpy==2.4.6; found {unpinned or 'none'}"
        )
    if settings.corpus == "hub" and not settings.dataset:
        faults.append("data.dataset: missing; give a name on the Hugging Face hub: data.dataset=owner/name")
    if settings.corpus in ("exercises", "textbooks") and settings.limit_documents is None:
        faults.append(
            "data.limit_documents: missing; the generator goes on for long: data.limit_documents=20_000"
        )
    if not 0 < settings.validation_fraction < 1:
        faults.append(
            f"data.validation_fraction: must be between 0 and 1; found {settings.validation_fraction}"
        )
    if settings.tokenizer is None and settings.vocab_size < 257:
        faults.append(
            "data.vocab_size: must be at least 257, for 256 bytes and the end of text; found "
            f"{settings.vocab_size}"
        )
    if not 0 <= settings.max_broken < 1:
        faults.append(f"data.max_broken: must be a share from 0 on, less than 1; found {settings.max_broken}")
    for key in (
        "limit_documents",
        "limit_bytes",
        "limit_tokens",
        "max_document_bytes",
        "shard_tokens",
        "model_max_length",
        "workers",
    ):
        value = getattr(settings, key)
        if value is not None and value <= 0:
            faults.append(f"data.{key}: must be positive; found {value}")
    if settings.home.name in ("", ".."):
        faults.append(f"data.folder: must be a folder of its own; found {str(settings.home)!r}")
    return faults + _cleaning_faults(settings.clean)


def _token_faults(settings: DataSettings) -> list[str]:
    """List what cannot be asked of tokens that are cut already."""
    faults = []
    if not settings.path:
        faults.append("data.path: missing; give a folder, a glob or a file of tokens: data.path=tokens/*.ds")
    if settings.tokenizer in (None, "train"):
        faults.append(
            "data.tokenizer: missing; name the tokenizer that cut the tokens, a folder or a hub name: "
            "data.tokenizer=gpt2"
        )
    return faults + _reading_faults(settings)


def _prepared_faults(settings: DataSettings) -> list[str]:
    """List what cannot be asked of a folder of tokens that is used as it is."""
    faults = []
    if not settings.path:
        faults.append("data.path: missing; give a folder that `outgrow corpus prepare` made")
    if settings.folder is not None:
        faults.append("data.folder: nothing is written; give the folder of the tokens as data.path")
    if settings.tokenizer is not None:
        faults.append("data.tokenizer: the folder holds the one that cut its tokens; leave it out")
    return faults + _reading_faults(settings)


def _reading_faults(settings: DataSettings) -> list[str]:
    """List what can be asked of a text alone."""
    limits = ("limit_documents", "limit_bytes", "limit_tokens")
    keys = [key for key in limits if getattr(settings, key) is not None]
    if settings.clean != CleaningSettings():
        keys.append("clean")
    return [f"data.{key}: tokens are read as they lie; leave it out, or prepare their text" for key in keys]


def _cleaning_faults(clean: CleaningSettings) -> list[str]:
    faults = []
    near = clean.near_duplicates
    if near is not None and not 0.5 <= near <= 1:
        faults.append(
            f"data.clean.near_duplicates: must be a similarity between 0.5 and 1, or null; found {near}"
        )
    if (clean.filter is None) != (clean.keep is None):
        faults.append(
            "data.clean: filter and keep go together: the folder of a fitted filter, and the share of "
            "documents to keep"
        )
    if clean.keep is not None and not 0 < clean.keep <= 1:
        faults.append(f"data.clean.keep: must be a share between 0 and 1; found {clean.keep}")
    return faults


# ---- a mixture ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceSettings:
    """One source of a mixture."""

    data: DataSettings  # a leaf of conf/data
    # over its training part, in the whole run; null: as many as the weights ask for
    max_passes: float | None = None


@dataclass(frozen=True)
class PhaseSettings:
    """A stretch of the run over which the proportions stay as they are: give `weights`, or `passes`.

    With weights it lasts `tokens`, or `share` of the run, or to the end.
    """

    weights: dict[str, float] | None = None  # source → share of the phase's tokens; together 1
    # source → how often it is read; the phase is as long as that takes
    passes: dict[str, float] | None = None
    tokens: int | None = None  # how long it lasts, with weights
    share: float | None = None  # of the run's tokens that it lasts, with weights, whatever the budget


@dataclass(frozen=True)
class MixtureSettings:
    """The text that is trained on, where that is not the training part of `data` alone; conf/mixture/*.yaml
    are its leaves.

    Validation text and tokenizer stay those of `data`, so that runs on different mixtures have comparable
    losses.
    """

    name: str
    sources: dict[str, SourceSettings]
    phases: tuple[PhaseSettings, ...]


# settings that say which documents are held out
HOLDING_OUT = ("seed", "validation_fraction", "validation_path", "clean.normalise")


def mixture_disagreements(mixture: MixtureSettings, data: DataSettings) -> list[str]:
    """List what is wrong with a mixture beside the validation text and tokenizer of `data`, one line each; no
    text is read for it."""
    faults = []
    phases = mixture.phases
    if not phases:
        faults.append("mixture.phases: none; give at least one, with weights or passes")
    for name, source in mixture.sources.items():
        key = f"mixture.sources.{name}"
        tokenizer = source.data.tokenizer
        passes = source.max_passes
        own = disagreements(source.data)
        faults += [f"{key}.{fault}" for fault in own]
        overlaps = held_out_faults(source.data, data)
        faults += [f"{key}.data.{fault}" for fault in overlaps]
        if passes is not None and passes <= 0:
            faults.append(f"{key}.max_passes: must be positive, or null; found {passes}")
        if tokenizer not in (None, data.tokenizer):
            faults.append(
                f"{key}.data.tokenizer: {tokenizer} is not the run's "
                f"data.tokenizer={data.tokenizer}, and a model reads with one only; set "
                f"data.tokenizer={tokenizer}, or this one to null"
            )
    used: set[str] = set()
    for number, phase in enumerate(phases):
        used.update(phase.weights or phase.passes or ())
        is_last = number == len(phases) - 1
        faults += _phase_faults(f"mixture.phases[{number}]", phase, mixture, last=is_last)
    total = fsum(phase.share or 0 for phase in phases)
    if total > 1 + 1e-9:
        faults.append(f"mixture.phases: their shares are {total:g} of the run together; at most 1")
    unused = [name for name in mixture.sources if name not in used]
    faults += [f"mixture.sources.{name}: in no phase; give it a weight, or leave it out" for name in unused]
    return faults


def held_out_faults(trained: DataSettings, judged: DataSettings) -> list[str]:
    """List why what is trained on may hold text that is held out of `judged`, one line each.

    Documents are held out by a hash of their text, so no document of one is held out in the other where both
    hash alike, and the one that is trained on holds out as large a share or a larger one.
    """
    if not _may_share(trained, judged):
        return []
    faults = []
    for key in HOLDING_OUT:
        value = attrgetter(key)(trained)
        other = attrgetter(key)(judged)
        holds = value >= other if key == "validation_fraction" else value == other
        if not holds:
            faults.append(
                f"{key}: {value}, and data={judged.name}, which may have texts in common with it, has "
                f"{other}: text held out for validation would be trained on; make them equal"
            )
    return faults


def _may_share(one: DataSettings, other: DataSettings) -> bool:
    """Check whether two corpora may have a document in common, as far as their settings tell."""
    if {one.corpus, other.corpus} <= {"stdlib", "packages"}:  # packages hold the standard library
        return True
    if one.corpus != other.corpus:
        return False
    if one.corpus == "hub":
        return one.dataset == other.dataset and one.split == other.split
    if one.corpus in ("files", "tokens", "prepared"):
        first = _root(one.path or "")
        second = _root(other.path or "")
        return first.is_relative_to(second) or second.is_relative_to(first)
    return True


def _root(path: str) -> Path:
    """The file or folder that a path names, or a glob begins with."""
    parts = Path(path).expanduser().parts
    plain = takewhile(lambda part: not glob.has_magic(part), parts)
    return Path(*plain).resolve()


def _phase_faults(name: str, phase: PhaseSettings, mixture: MixtureSettings, *, last: bool) -> list[str]:
    """List what is wrong with the phase that is called `name`."""
    if (phase.weights is None) == (phase.passes is None):
        return [f"{name}: give either weights or passes"]
    weighted = phase.weights is not None
    key = "weights" if weighted else "passes"
    parts = phase.weights or phase.passes or {}
    faults = []
    for source in parts:
        if source not in mixture.sources:
            hint = did_you_mean(source, mixture.sources)
            faults.append(f"{name}.{key}: unknown source {source!r}; {hint}")
    for source, value in parts.items():
        if not value > 0:
            faults.append(f"{name}.{key}.{source}: must be positive; found {value}")
    if weighted:
        total = fsum(parts.values())
        if abs(total - 1) > 1e-9:
            terms = " + ".join(f"{value:g}" for value in parts.values()) or "nothing"
            faults.append(f"{name}.weights: must sum to 1; {terms} = {total:g}")

    # how long it lasts
    tokens = phase.tokens
    share = phase.share
    if tokens is not None and not weighted:
        faults.append(f"{name}.tokens: passes say how long the phase is; leave it out")
    elif tokens is not None and tokens <= 0:
        faults.append(f"{name}.tokens: must be positive")
    has_length = tokens is not None or not weighted
    if share is not None and (has_length or not 0 < share <= 1):
        faults.append(
            f"{name}.share: with weights and without tokens, a share of the run between 0 and 1; "
            f"found {share}"
        )
    if share is None and not has_length and not last:
        faults.append(
            f"{name}.tokens: missing, and no share; only the last phase may last to the end of the run"
        )
    return faults
