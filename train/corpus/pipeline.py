"""The way from text to shards, read from top to bottom: read → normalise → exact duplicates → near duplicates
→ benchmarks → educational filter → tokenise → shards and manifest.

Each step is a `PipelineStep` of datatrove; `stage(name, steps, tasks)` does it once for each task, on this
machine or a cluster (executors.py). How many tasks there are comes from the input alone, so neither workers
nor executors can change a byte. What each task did lies in the workshop, whole or absent: a build that is
killed does again what was at work, and no more. Between the stages, this process reads what the tasks found
out and decides what concerns all documents.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import write_json, write_text
from outgrow.train.corpus import benchmarks as tests
from outgrow.train.corpus.benchmarks import FindOverlaps, write_benchmarks
from outgrow.train.corpus.duplicates import (
    PERMUTATIONS,
    SHINGLE_WORDS,
    ExactDuplicates,
    NearDuplicates,
    Sign,
    bands,
)
from outgrow.train.corpus.executors import Stage
from outgrow.train.corpus.filter.score import Educational, KeepScores, threshold
from outgrow.train.corpus.listing import write_listing
from outgrow.train.corpus.normalise import Normalise
from outgrow.train.corpus.progress import say
from outgrow.train.corpus.read.corpora import Corpus, is_full
from outgrow.train.corpus.read.document import Tally
from outgrow.train.corpus.read.files import File, Files, hash_of
from outgrow.train.corpus.read.steps import Fetch, PutDown, Read
from outgrow.train.corpus.tokenise import (
    ENCODER,
    Kept,
    Lengths,
    Pack,
    Split,
    Tokenise,
    kept_rows,
    shards_of,
    split_key,
)
from outgrow.train.corpus.verdicts import (
    EXACT,
    KEPT,
    NEAR,
    REMOVED,
    Match,
    Verdicts,
    remove_low,
    remove_overlaps,
    scores_of,
    write_removed,
)
from outgrow.train.corpus.workshop import Workshop, plain, tally_of
from outgrow.train.data.settings import CleaningSettings, DataSettings
from outgrow.train.data.shards import SPLITS, TOKENIZER, dtype_of, fingerprint, split_entry
from outgrow.train.data.tokenizer import (
    entries,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    write_encoder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# of text, at most, that a tokenizer is trained on: the first documents of the training part
TRAINING_BYTES = 2**28
NGRAMS = "benchmarks.npz"  # in the workshop


def make(partial: Path, work: Workshop, settings: DataSettings, stage: Stage) -> dict[str, Any]:
    """Write tokenizer and shards into the folder `partial`; return the manifest.

    Raises:
        UserError: text that cannot be read, a split without documents, a full disk.
    """
    clean = settings.clean
    read(work, settings, stage)
    verdicts = Verdicts.begin(work)
    cleaning = remove_duplicates(work, verdicts, clean, stage)
    cleaning |= remove_tests(work, verdicts, clean)
    cleaning |= keep_best(work, verdicts, clean, stage)
    boilerplate = set(cleaning.pop("boilerplate", ()))
    cleaning = {"removed": write_removed(work, verdicts, partial / REMOVED, boilerplate), **cleaning}
    split = split_of(work, verdicts, settings)
    tokenizer = make_tokenizer(partial, work, verdicts, split, settings)
    dtype = dtype_of(entries(tokenizer))
    stage("tokenise", [Kept(work), Tokenise(work, split, dtype)], len(work.counts), title="tokenising")
    splits = pack(partial, work, settings, dtype, stage)
    manifest = {
        "read": {
            key: value for key, value in plain(work.tally).items() if key not in ("item", "records", "broken")
        },
        "cleaning": cleaning,
        "short": short(settings, work.tally, sum(split["tokens"] for split in splits.values())),
        "tokenizer": {
            "sha256": tokenizer_hash(tokenizer),
            "vocab_size": entries(tokenizer),
            "end_of_text_id": tokenizer.eos_token_id,
        },
        "dtype": dtype.str,
        "splits": splits,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenizers", "transformers", "datatrove")},
        },
    }
    return manifest | {"fingerprint": fingerprint(manifest)}


# ---- read --------------------------------------------------------------------------------------------------


def as_files(folder: Path, settings: DataSettings, corpus: Corpus, stage: Stage) -> Files:
    """The corpus as files: a stream (a dataset of the hub, a generator) is written down first."""
    if isinstance(corpus, Files):
        return corpus
    if not (folder / "done.json").is_file():
        stage("fetch", [Fetch(folder, settings, corpus)], 1, title="fetching")
    pieces = (
        folder / f"{number:06d}.piece.parquet"
        for number in range(json.loads((folder / "done.json").read_text())["pieces"])
    )
    files = [File(path.name, str(path), path.stat().st_size, "") for path in pieces]
    return Files(tuple(files))


def read(work: Workshop, settings: DataSettings, stage: Stage) -> None:
    """Put all documents down, normalised, with their signatures and what they have in common with the
    benchmarks."""
    if work.read.is_file():
        return
    clean = settings.clean
    if clean.benchmarks is not None and not (work.folder / "benchmarks.json").is_file():
        write_json(work.folder / "benchmarks.json", write_benchmarks(clean.benchmarks, work.folder / NGRAMS))
    stage("read", reading(work, settings), len(work.tasks), title="reading")
    counts, tally = settle(work, settings, stage)
    tally.check_broken(settings.max_broken)
    write_json(work.read, {"counts": counts, "tally": plain(tally)})


def reading(work: Workshop, settings: DataSettings, task: int | None = None) -> list[Any]:
    """The steps that one task does with its files; `task`: this one, whatever the rank."""
    clean, reader = settings.clean, Read(work, settings, task)
    normalise = [Normalise()] if clean.normalise else []
    sign = [Sign(clean.words)] if clean.near_duplicates is not None else []
    compare = [FindOverlaps(work.folder / NGRAMS)] if clean.benchmarks is not None else []
    return [
        reader,
        *normalise,
        *sign,
        *compare,
        PutDown(work, reader, signed=bool(sign), compared=bool(compare)),
    ]


def settle(work: Workshop, settings: DataSettings, stage: Stage) -> tuple[list[int], Tally]:
    """How many documents each task has, up to the limits, and what was read altogether.

    Tasks at work side by side do not know what those before them read, so the one in which a limit lies may
    have read too much: it reads again. What lies behind it does not count, be it broken.

    Raises:
        UserError: a file cannot be read.
    """
    counts, tally = list[int](), skipped_in_fetching(work)
    for task in range(len(work.tasks)):
        if is_full(settings, tally):
            break
        done = work.done(task)
        before = {"documents": tally.documents, "bytes": tally.bytes}
        if done is None or (done["before"] != before and _reaches(settings, tally, done)):
            work.path("text", task, ".json").unlink(missing_ok=True)
            shutil.rmtree(work.stages / f"again-{task}", ignore_errors=True)
            stage(f"again-{task}", reading(work, settings, task), 1)
            done = work.done(task)
        assert done is not None
        if done["fault"] is not None:
            work.path("text", task, ".json").unlink()  # the next attempt reads it again
            raise UserError(done["fault"])
        counts.append(tally_of(done).documents)
        tally.add(tally_of(done))
    return counts, tally


def _reaches(settings: DataSettings, before: Tally, done: dict[str, Any]) -> bool:
    """Whether a limit may lie in what a task read after so much; then it depends on that how far it had
    to."""
    both = replace(before)
    both.add(tally_of(done))
    return done["fault"] is not None or is_full(settings, both)


def skipped_in_fetching(work: Workshop) -> Tally:
    """What was left out when a stream was written down; its documents are counted when they are read."""
    if not (work.fetched / "done.json").is_file():
        return Tally()
    return replace(
        tally_of(json.loads((work.fetched / "done.json").read_text())),
        documents=0,
        bytes=0,
        records=0,
        item=0,
    )


def digest(work: Workshop) -> dict[str, Any]:
    """A hash of the names and contents of the files that were read; how many these are, where a limit ended
    the reading before the last."""
    contents = [
        content for task in range(len(work.counts)) for content in (work.done(task) or {})["contents"]
    ]
    return {"digest": hash_of(contents)} | (
        {"files": len(contents)} if len(work.counts) < len(work.tasks) else {}
    )


# ---- clean -------------------------------------------------------------------------------------------------


def remove_duplicates(
    work: Workshop, verdicts: Verdicts, clean: CleaningSettings, stage: Stage
) -> dict[str, Any]:
    """Leave out later copies and later near copies, as far as that is asked for; where it is not, say how
    many copies there are."""
    stage("exact", [ExactDuplicates(work)], 1)
    copies = Match.load(work.path("exact", 0, ".npz"))
    if clean.exact_duplicates:
        verdicts.match(copies, EXACT)
    if clean.near_duplicates is None:
        return _copies(work, len(copies.documents), clean)
    shape = bands(clean.near_duplicates)
    stage("near", [NearDuplicates(work, clean.near_duplicates)], shape[0], title="near duplicates")
    for band in range(shape[0]):
        verdicts.match(Match.load(work.path("near", band, ".npz")), NEAR)
    return {
        "near_duplicates": {
            "words": clean.words,
            "shingle_words": SHINGLE_WORDS,
            "permutations": PERMUTATIONS,
            "bands": shape[0],
            "rows": shape[1],
        }
    }


def _copies(work: Workshop, count: int, clean: CleaningSettings) -> dict[str, Any]:
    if clean.exact_duplicates or not count:
        return {}
    say(
        f"{count:,} of {sum(work.counts):,} documents are exact copies of an earlier one (on its side of "
        "the split); near copies are not looked for; data.clean.exact_duplicates=true "
        "data.clean.near_duplicates=0.8 remove them"
    )
    return {"copies_kept": count}


def remove_tests(work: Workshop, verdicts: Verdicts, clean: CleaningSettings) -> dict[str, Any]:
    """Leave out what overlaps a benchmark, and say what could not be looked for."""
    if clean.benchmarks is None:
        return {}
    counts = json.loads((work.folder / "benchmarks.json").read_text())
    if counts["too_short"]:
        say(
            f"data.clean.benchmarks: {counts['too_short']:,} of {counts['texts']:,} texts have less than "
            f"{tests.SHORT_WORDS} words and are not looked for"
        )
    found = remove_overlaps(work, verdicts, tests.COMMON_DOCUMENTS, tests.COMMON_SHARE)
    return {"benchmarks": counts | {"boilerplate": found["told"]}, "boilerplate": found["ngrams"]}


def keep_best(work: Workshop, verdicts: Verdicts, clean: CleaningSettings, stage: Stage) -> dict[str, Any]:
    """Score what is left, and keep the best share of it.

    Raises:
        UserError: the filter or its encoder cannot be loaded.
    """
    if clean.filter is None or clean.keep is None:
        return {}
    score = Educational(str(Path(clean.filter).expanduser()), clean.encoder)
    stage("score", [Kept(work), score, KeepScores(work)], len(work.counts), title="scoring")

    def scores() -> Iterator[np.ndarray]:
        return (scores_of(work, task) for task in range(len(work.counts)))

    limit = threshold(scores, clean.keep)
    remove_low(work, verdicts, limit)
    return {"filter": {"keep": clean.keep, **limit}}


# ---- tokenise ----------------------------------------------------------------------------------------------


def split_of(work: Workshop, verdicts: Verdicts, settings: DataSettings) -> Split:
    """How the text is split: by the hash of each, but so that both parts have something.

    Raises:
        UserError: nothing is left to split.
    """
    keys = [np.empty(0, np.uint64)]
    for task, where in verdicts.ranges():
        rows = np.flatnonzero(verdicts.kept(task))
        digests = work.digests(task)[: where.stop - where.start][rows]
        keys_of_task = [split_key(digest.tobytes(), settings.seed) for digest in digests]
        keys.append(np.array(keys_of_task, np.uint64))
    every = np.concatenate(keys)
    numbers = np.flatnonzero(verdicts.verdict == KEPT)
    if not len(every):
        raise _nothing_left(work, settings)
    if len(every) == 1:
        return Split(settings, cut=True)
    bound = min(settings.validation_fraction * 2**64, 2**64 - 1)
    validation = every < np.uint64(bound)
    if validation.any() and not validation.all():
        return Split(settings)
    number = int(numbers[every.argmax() if validation.all() else every.argmin()])
    task = int(np.searchsorted(work.starts, number, side="right")) - 1
    return Split(settings, named=(task, number - work.starts[task]))


def _nothing_left(work: Workshop, settings: DataSettings) -> UserError:
    if sum(work.counts):
        return UserError(
            f"data {settings.name!r}: cleaning removed all {sum(work.counts):,} documents; loosen "
            "data.clean, or give other text"
        )
    return UserError(
        f"data {settings.name!r}: not one document in the text (left out: {_left_out(work.tally)}); give "
        "more text"
    )


def _left_out(tally: Tally) -> str:
    parts = []
    for key, count in plain(tally).items():
        if key.endswith("_skipped") and count:
            reason = key.removesuffix("_skipped").replace("_", " ")
            parts.append(f"{count:,} {reason}")
    return ", ".join(parts) or "nothing"


def make_tokenizer(
    partial: Path, work: Workshop, verdicts: Verdicts, split: Split, settings: DataSettings
) -> PreTrainedTokenizerFast:
    """The tokenizer, saved in the folder, and in the workshop as the workers read it."""
    if (work.folder / ENCODER).is_file():
        return load_tokenizer(str(partial / TOKENIZER))
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        texts = training_texts(work, verdicts, split)
        tokenizer = train_tokenizer(
            texts, vocab_size=settings.vocab_size, model_max_length=settings.model_max_length
        )
    save_tokenizer(tokenizer, partial / TOKENIZER)
    write_text(work.folder / ENCODER, write_encoder(tokenizer))
    return tokenizer


def training_texts(work: Workshop, verdicts: Verdicts, split: Split) -> Iterator[str]:
    """The first TRAINING_BYTES of the training part."""
    seen = 0
    for task in range(len(work.counts)):
        for row in kept_rows(work, verdicts, task):
            for text, validation in split.parts(task, row.document):
                if not validation:
                    yield text
                    seen += row.bytes
            if seen >= TRAINING_BYTES:
                return


# ---- shards ------------------------------------------------------------------------------------------------


def pack(
    partial: Path, work: Workshop, settings: DataSettings, dtype: np.dtype, stage: Stage
) -> dict[str, Any]:
    """Write the shards of both splits up to limit_tokens, and the list of their documents; return what the
    manifest says of the splits."""
    ends: dict[str, list[int]] = {name: [] for name in SPLITS}
    counts = {name: {"documents": 0, "bytes": 0, "tokens": 0} for name in SPLITS}

    def taken() -> Iterator[tuple[int, Lengths]]:
        for task in range(len(work.counts)):
            lengths = up_to_the_limit(
                Lengths.load(work, task), settings, sum(split["tokens"] for split in counts.values())
            )
            for name, split in counts.items():
                part = lengths.of(name)
                split["documents"] += len(part.row)
                split["bytes"] += int(part.bytes.sum())
                split["tokens"] += int(part.tokens.sum())
                ends[name].append(split["tokens"])
            yield task, lengths

    write_listing(work, partial, taken())
    for name, split in counts.items():
        if not split["documents"]:
            raise UserError(
                f"data {settings.name!r}: not one {'training' if name == 'train' else name} document among "
                f"the first {settings.limit_tokens} tokens; raise data.limit_tokens, or "
                f"data.validation_fraction={settings.validation_fraction}"
            )
    shards = {name: list(shards_of(name, counts[name]["tokens"], settings.shard_tokens)) for name in SPLITS}
    every = list(chain(*shards.values()))
    stage("pack", [Pack(work, partial, every, ends, dtype)], len(every), title="packing")
    return {name: counts[name] | split_entry(partial, shards[name]) for name in SPLITS}


def up_to_the_limit(lengths: Lengths, settings: DataSettings, before: int) -> Lengths:
    """The document that reaches limit_tokens is the last."""
    if settings.limit_tokens is None:
        return lengths
    reached = before + np.cumsum(lengths.tokens) - lengths.tokens  # in front of each document
    return lengths[: int(np.searchsorted(reached, settings.limit_tokens))]


def short(settings: DataSettings, tally: Tally, tokens: int) -> dict[str, dict[str, int]]:
    """The limits that the text ended before, with what was asked for and what there was."""
    read = {
        "limit_documents": (settings.limit_documents, tally.documents),
        "limit_bytes": (settings.limit_bytes, tally.bytes),
    }
    if is_full(settings, tally):  # one of the limits ended the reading, not the text
        read = {}
    return {
        key: {"asked": asked, "found": amount}
        for key, (asked, amount) in {**read, "limit_tokens": (settings.limit_tokens, tokens)}.items()
        if asked is not None and amount < asked
    }
