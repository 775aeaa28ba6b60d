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
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import write_json, write_text
from outgrow.train.corpus.across import near_across
from outgrow.train.corpus.benchmarks import (
    COMMON_DOCUMENTS,
    COMMON_SHARE,
    SHORT_WORDS,
    FindOverlaps,
    write_benchmarks,
)
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
    described,
    entries,
    import_library,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    write_encoder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# of text, at most, that a tokenizer is trained on: the first documents of the training part
TRAINING_BYTES = 2**28
NGRAMS, BENCHMARKS = "benchmarks.npz", "benchmarks.json"  # in the workshop


def make(partial: Path, work: Workshop, settings: DataSettings, stage: Stage) -> dict[str, Any]:
    """Write tokenizer and shards into the folder `partial`; return the manifest.

    Raises:
        UserError: text that cannot be read, a split without documents, a full disk.
    """
    clean = settings.clean
    # Read and normalise. What needs the text alone is found out with it: MinHash signatures, overlaps with
    # benchmarks.
    read(work, settings, stage)
    # Clean: a verdict on each document, in this order; what one step leaves out, the next does not see.
    verdicts = Verdicts.begin(work)
    cleaning = remove_exact(work, verdicts, clean, stage)
    cleaning |= remove_near(work, verdicts, clean, stage)
    cleaning |= decontaminate(work, verdicts, clean)
    cleaning |= keep_best(work, verdicts, clean, stage)
    boilerplate = set(cleaning.pop("boilerplate", ()))
    removed = write_removed(work, verdicts, partial / REMOVED, boilerplate)
    # Split what stays into training and validation text.
    split = split_of(work, verdicts, settings)
    # Tokenise, each document by itself; meanwhile, look for near copies across the split.
    tokenizer = make_tokenizer(partial, work, verdicts, split, settings)
    dtype = dtype_of(entries(tokenizer))
    steps = [Kept(work), Tokenise(work, split, dtype)]

    def compare() -> None:
        if clean.near_duplicates is None:
            cleaning.update(near_across(work, verdicts, split, clean.words))

    stage("tokenise", steps, len(work.counts), title="tokenising", meanwhile=compare)
    # Cut the ids into shards, and say what is in them.
    splits = pack(partial, work, settings, dtype, stage)
    tokens = sum(split["tokens"] for split in splits.values())
    tally = plain(work.tally)
    for key in ("item", "records", "broken"):
        tally.pop(key, None)
    libraries = ("tokenizers", "transformers", "datatrove")
    manifest = {
        "read": tally,
        "cleaning": {"removed": removed, **cleaning},
        "short": short(settings, work.tally, tokens),
        "tokenizer": described(tokenizer),
        "dtype": dtype.str,
        "splits": splits,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
        },
    }
    return manifest | {"fingerprint": fingerprint(manifest)}


# ---- read --------------------------------------------------------------------------------------------------


def as_files(folder: Path, settings: DataSettings, corpus: Corpus, stage: Stage) -> Files:
    """The corpus as files: a stream (a dataset of the hub, a generator) is written down first."""
    if isinstance(corpus, Files):
        return corpus
    done = folder / "done.json"
    if not done.is_file():
        stage("fetch", [Fetch(folder, settings, corpus)], 1, title="fetching")
    count = json.loads(done.read_text())["pieces"]
    files = []
    for number in range(count):
        path = folder / f"{number:06d}.piece.parquet"
        size = path.stat().st_size
        files.append(File(path.name, str(path), size, ""))
    return Files(tuple(files))


def read(work: Workshop, settings: DataSettings, stage: Stage) -> None:
    """Put all documents down, normalised, with their signatures and what they have in common with the
    benchmarks."""
    if work.read.is_file():
        return
    benchmarks = settings.clean.benchmarks
    summary = work.folder / BENCHMARKS
    if benchmarks is not None and not summary.is_file():
        write_json(summary, write_benchmarks(benchmarks, work.folder / NGRAMS))
    steps = reading(work, settings)
    import_own = partial(import_library, settings.tokenizer)
    stage("read", steps, len(work.tasks), title="reading", meanwhile=import_own)
    counts, tally = settle(work, settings, stage)
    tally.check_broken(settings.max_broken)
    for fault in tally.broken:
        say(f"left out: {fault}")
    write_json(work.read, {"counts": counts, "tally": plain(tally)})


def reading(work: Workshop, settings: DataSettings, task: int | None = None) -> list[Any]:
    """The steps that one task does with its files; `task`: this one, whatever the rank."""
    clean = settings.clean
    reader = Read(work, settings, task)
    signed = clean.near_duplicates is not None
    compared = clean.benchmarks is not None
    steps: list[Any] = [reader]
    if clean.normalise:
        steps.append(Normalise())
    if signed:
        steps.append(Sign(clean.words))
    if compared:
        steps.append(FindOverlaps(work.folder / NGRAMS))
    steps.append(PutDown(work, reader, signed=signed, compared=compared))
    return steps


def settle(work: Workshop, settings: DataSettings, stage: Stage) -> tuple[list[int], Tally]:
    """The number of documents that each task has, up to the limits, and what was read altogether.

    Tasks at work side by side do not know what those before them read, so the one in which a limit lies may
    have read too much: it reads again. What lies behind it does not count, be it broken.

    Raises:
        UserError: a file cannot be read.
    """
    counts: list[int] = []
    tally = skipped_in_fetching(work)
    for task in range(len(work.tasks)):
        if is_full(settings, tally):
            break
        outcome = work.path("text", task, ".json")
        done = work.done(task)
        if done is None or _is_stale(settings, tally, done):
            outcome.unlink(missing_ok=True)
            again = f"again-{task}"
            shutil.rmtree(work.stages / again, ignore_errors=True)
            stage(again, reading(work, settings, task), 1)
            done = work.done(task)
        assert done is not None
        if done["fault"] is not None:
            outcome.unlink()  # the next attempt reads it again
            raise UserError(done["fault"])
        own = tally_of(done)
        counts.append(own.documents)
        tally.add(own)
    return counts, tally


def _is_stale(settings: DataSettings, before: Tally, done: dict[str, Any]) -> bool:
    """Check whether a task knew of another amount before it, and a limit may lie in what it read: then it
    depends on that amount how far it had to.
    """
    if done["before"] == {"documents": before.documents, "bytes": before.bytes}:
        return False
    both = replace(before)
    both.add(tally_of(done))
    return done["fault"] is not None or is_full(settings, both)


def skipped_in_fetching(work: Workshop) -> Tally:
    """Tell what was left out when a stream was written down; its documents are counted when they are read."""
    done = work.fetched / "done.json"
    if not done.is_file():
        return Tally()
    fetched = tally_of(json.loads(done.read_text()))
    return replace(fetched, documents=0, bytes=0, records=0, item=0)


def digest(work: Workshop) -> dict[str, Any]:
    """A hash of the names and contents of the files that were read; how many these are, where a limit ended
    the reading before the last."""
    contents = []
    for task in range(len(work.counts)):
        done = work.done(task)
        assert done is not None
        contents += done["contents"]
    entry: dict[str, Any] = {"digest": hash_of(contents)}
    if len(work.counts) < len(work.tasks):
        entry["files"] = len(contents)
    return entry


# ---- clean -------------------------------------------------------------------------------------------------


def remove_exact(work: Workshop, verdicts: Verdicts, clean: CleaningSettings, stage: Stage) -> dict[str, Any]:
    """Leave out later copies of a text where that is asked for; where no duplicates are, say how many there
    are."""
    stage("exact", [ExactDuplicates(work)], 1)
    copies = Match.load(work.path("exact", 0, ".npz"))
    if clean.exact_duplicates:
        verdicts.match(copies, EXACT)
    elif clean.near_duplicates is None:
        return _copies(work, len(copies.documents))
    return {}


def _copies(work: Workshop, count: int) -> dict[str, Any]:
    if not count:
        return {}
    say(
        f"{count:,} of {sum(work.counts):,} documents are exact copies of an earlier one (on its side of "
        "the split); data.clean.exact_duplicates=true removes them"
    )
    return {"copies_kept": count}


def remove_near(work: Workshop, verdicts: Verdicts, clean: CleaningSettings, stage: Stage) -> dict[str, Any]:
    """Leave out later near copies of a text, by MinHash, where that is asked for: one task a band."""
    if clean.near_duplicates is None:
        return {}
    count, rows = bands(clean.near_duplicates)
    step = NearDuplicates(work, clean.near_duplicates)
    stage("near", [step], count, title="near duplicates")
    for band in range(count):
        matches = Match.load(work.path("near", band, ".npz"))
        verdicts.match(matches, NEAR)
    return {
        "near_duplicates": {
            "words": clean.words,
            "shingle_words": SHINGLE_WORDS,
            "permutations": PERMUTATIONS,
            "bands": count,
            "rows": rows,
        }
    }


def decontaminate(work: Workshop, verdicts: Verdicts, clean: CleaningSettings) -> dict[str, Any]:
    """Leave out what overlaps a benchmark, and say what could not be looked for."""
    if clean.benchmarks is None:
        return {}
    counts = json.loads((work.folder / BENCHMARKS).read_text())
    if counts["too_short"]:
        say(
            f"data.clean.benchmarks: {counts['too_short']:,} of {counts['texts']:,} texts have less than "
            f"{SHORT_WORDS} words and are not looked for"
        )
    boilerplate = remove_overlaps(work, verdicts, COMMON_DOCUMENTS, COMMON_SHARE)
    counts["boilerplate"] = boilerplate["told"]
    return {"benchmarks": counts, "boilerplate": boilerplate["ngrams"]}


def keep_best(work: Workshop, verdicts: Verdicts, clean: CleaningSettings, stage: Stage) -> dict[str, Any]:
    """Score what is left, and keep the best share of it.

    Raises:
        UserError: the filter or its encoder cannot be loaded.
    """
    if clean.filter is None or clean.keep is None:
        return {}
    weights = Path(clean.filter).expanduser()
    steps = [Kept(work), Educational(str(weights), clean.encoder), KeepScores(work)]
    tasks = len(work.counts)
    stage("score", steps, tasks, title="scoring")

    def scores() -> Iterator[np.ndarray]:
        return (scores_of(work, task) for task in range(tasks))

    limit = threshold(scores, clean.keep)
    remove_low(work, verdicts, limit)
    return {"filter": {"keep": clean.keep, **limit}}


# ---- tokenise ----------------------------------------------------------------------------------------------


def split_of(work: Workshop, verdicts: Verdicts, settings: DataSettings) -> Split:
    """The split of the text: by the hash of each document, but so that both parts have something.

    Raises:
        UserError: nothing is left to split.
    """
    hashes = _split_hashes(work, verdicts, settings.seed)
    lowest = highest = next(hashes, None)
    if lowest is None or highest is None:
        raise _nothing_left(work, settings)
    for entry in hashes:
        lowest = min(lowest, entry)
        highest = max(highest, entry)
    if lowest == highest:
        return Split(settings, cut=True)
    bound = settings.validation_fraction * 2**64
    if lowest[0] < bound <= highest[0]:
        return Split(settings)
    _, named = lowest if bound <= lowest[0] else highest
    return Split(settings, named)


def _split_hashes(work: Workshop, verdicts: Verdicts, seed: int) -> Iterator[tuple[int, bytes]]:
    """Hash and digest of each document that stays, one after another: no list of all is in memory."""
    for task in range(len(work.counts)):
        digests = work.digests(task)
        for row in np.flatnonzero(verdicts.kept(task)).tolist():
            raw = digests[row].tobytes()
            yield split_key(raw, seed), raw


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
            for text, validation in split.parts(row.document):
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
            before = sum(split["tokens"] for split in counts.values())
            lengths = up_to_the_limit(Lengths.load(work, task), settings, before)
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
            kind = "training" if name == "train" else name
            raise UserError(
                f"data {settings.name!r}: not one {kind} document among "
                f"the first {settings.limit_tokens} tokens; raise data.limit_tokens, or "
                f"data.validation_fraction={settings.validation_fraction}"
            )

    def shards_in(name: str) -> list[Any]:
        tokens = counts[name]["tokens"]
        return list(shards_of(name, tokens, settings.shard_tokens))

    shards = {name: shards_in(name) for name in SPLITS}
    every = list(chain(*shards.values()))
    step = Pack(work, partial, every, ends, dtype)
    stage("pack", [step], len(every), title="packing")
    return {name: counts[name] | split_entry(partial, shards[name]) for name in SPLITS}


def up_to_the_limit(lengths: Lengths, settings: DataSettings, before: int) -> Lengths:
    """The document that reaches limit_tokens is the last."""
    if settings.limit_tokens is None:
        return lengths
    ends = before + np.cumsum(lengths.tokens)
    begins = ends - lengths.tokens
    count = int(np.searchsorted(begins, settings.limit_tokens))
    return lengths[:count]


def short(settings: DataSettings, tally: Tally, tokens: int) -> dict[str, dict[str, int]]:
    """The limits that the text ended before, with what was asked for and what there was."""
    amounts = {
        "limit_documents": (settings.limit_documents, tally.documents),
        "limit_bytes": (settings.limit_bytes, tally.bytes),
    }
    if is_full(settings, tally):  # one of the limits ended the reading, not the text
        amounts = {}
    amounts["limit_tokens"] = (settings.limit_tokens, tokens)
    missed = {}
    for key, (limit, amount) in amounts.items():
        if limit is not None and amount < limit:
            missed[key] = {"asked": limit, "found": amount}
    return missed
