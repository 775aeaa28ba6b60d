"""`prepare`: tokens that are there and current, built if need be, by one process while the others wait.

A build reads, cleans, tokenises and packs in `<folder>.partial` and renames it, so the folder is complete or absent. A build that was
stopped, by a fault or by kill −9, goes on where it was: blocks and shards that are whole are not done again.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from outgrow.model.base.atomic import partial_of, take_place
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import write_json, write_text
from outgrow.model.base.locks import Lock
from outgrow.train.data.benchmarks import benchmarks_identity, write_benchmarks
from outgrow.train.data.blocks import BENCHMARKS, Workshop, in_blocks, stage
from outgrow.train.data.corpus import documents, is_full, is_validation, open_corpus
from outgrow.train.data.document import Corpus, Tally
from outgrow.train.data.filter.score import filter_identity
from outgrow.train.data.judge import REMOVED, Verdicts, judge, keep_best, write_removed
from outgrow.train.data.pack import ENCODER, Lengths, pack
from outgrow.train.data.progress import Advance, bar
from outgrow.train.data.report import short_lines
from outgrow.train.data.settings import DataSettings, disagreements
from outgrow.train.data.shards import TOKENIZER, ShardWriter, TokenData, dtype_of, fingerprint, open_data, read_manifest, write_manifest
from outgrow.train.data.tokenizer import (
    TRAIN,
    entries,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    tokenizer_identity,
    train_tokenizer,
    write_encoder,
)
from outgrow.train.data.workers import Run, cores, workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 2  # of the folder; a change of what is written, or how text is read, raises it
ELSEWHERE = ("name", "folder", "path", "workers")  # settings that say where and by whom, and nothing of the tokens
SLOW_BYTES = 2**31  # of text, that take more than a moment to hash
SMALL_BYTES = 2**26  # of text, that starting processes is not worth it for
TRAINING_BYTES = 2**28  # of text, at most, that a tokenizer is trained on: the first documents of the training part


def prepare(settings: DataSettings, *, progress: bool = True) -> TokenData:
    """The tokens of `settings`, opened; built first where they are missing or the input or a setting has changed.

    Any number of processes may call this at once. `progress` shows bars on stderr.

    Raises:
        UserError: settings that cannot work, text that cannot be read, a split without documents, a damaged folder, a full disk.
    """
    settings = replace(settings, tokenizer=None) if settings.tokenizer == TRAIN else settings
    UserError.collect(disagreements(settings))
    folder, corpus = settings.home, open_corpus(settings)
    if _outdated(folder, settings, corpus, progress):
        with _only_one(folder):
            if reason := _outdated(folder, settings, corpus, progress):  # not built by another while we waited
                if progress:
                    print(f"{folder}: {reason}", file=sys.stderr)
                _build(folder, settings, corpus, progress)
    return open_data(folder)


def cut_by(settings: DataSettings, tokenizer: Path) -> DataSettings:
    """The text of `settings`, cut by the tokenizer in a folder, in a folder of its own; what is there already serves where it is the same.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    identity, there = tokenizer_identity(str(tokenizer)), settings.home / TOKENIZER
    current = there.is_dir() and tokenizer_identity(str(there)) == identity
    if current and _outdated(settings.home, settings, open_corpus(settings), progress=False) is None:
        return settings
    folder = settings.folder or f"{settings.home}-{str(identity)[:8]}"
    return replace(settings, tokenizer=str(tokenizer), folder=folder)


def _outdated(folder: Path, settings: DataSettings, corpus: Corpus, progress: bool) -> str | None:
    """Why the folder has to be built; None where it is current."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "building the tokens"
    found, wanted = manifest["settings"], _identity(settings)
    if changed := [f"{key} {found.get(key)} → {value}" for key, value in wanted.items() if found.get(key) != value]:
        return f"building the tokens again, for settings changed: {', '.join(changed)}"
    if not _same_text(manifest["inputs"], corpus, progress):
        return "building the tokens again, for the text has changed"
    return None


def _same_text(inputs: dict[str, str], corpus: Corpus, progress: bool) -> bool:
    return inputs["stamp"] == corpus.stamp() or inputs["digest"] == _digest(corpus, progress)  # the first needs no reading


def _digest(corpus: Corpus, progress: bool) -> str:
    with bar("comparing the text", corpus.size, progress and (corpus.size or 0) >= SLOW_BYTES) as advance:
        return corpus.digest(advance)


def _identity(settings: DataSettings) -> dict[str, Any]:
    """Everything but the text that decides what is written, as JSON has it: a manifest is held against it."""
    values = {key: value for key, value in asdict(settings).items() if key not in ELSEWHERE}
    if settings.clean.benchmarks is not None:
        values["clean"]["benchmarks"] = benchmarks_identity(settings.clean.benchmarks)
    if settings.clean.filter is not None:
        values["clean"]["filter"] = filter_identity(settings.clean.filter)
    values["clean"].pop("encoder")  # where it lies; which one it is, the filter says
    identity = {"format": FORMAT, **values, "tokenizer": tokenizer_identity(settings.tokenizer)}
    return cast(dict[str, Any], json.loads(json.dumps(identity)))


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.with_name(folder.name + ".lock"))
        lock.wait()
    with lock:
        yield


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); make room, or choose another data.folder") from error


# ---- building -------------------------------------------------------------------------------------------------------------------------


def _build(folder: Path, settings: DataSettings, corpus: Corpus, progress: bool) -> None:
    partial = partial_of(folder)
    with _writing(folder):
        if not _is_current(partial, settings, corpus, progress):
            work = _open_workshop(partial, settings, corpus, progress)
            write_manifest(partial, _write(partial, work, settings, corpus, progress))
        shutil.rmtree(partial / "work", ignore_errors=True)
        take_place(folder)
    for line in short_lines(read_manifest(folder)) if progress else ():
        print(f"{folder}: {line}", file=sys.stderr)


def _is_current(partial: Path, settings: DataSettings, corpus: Corpus, progress: bool) -> bool:
    """Whether all that is left is to rename it: killed between the manifest and that."""
    return (partial / "manifest.json").is_file() and _outdated(partial, settings, corpus, progress) is None


def _open_workshop(partial: Path, settings: DataSettings, corpus: Corpus, progress: bool) -> Workshop:
    """Go on in what a stopped build of the same text and settings left; else begin."""
    work, identity = Workshop(partial / "work"), _identity(settings)
    if work.plan.is_file() and not (partial / "manifest.json").exists():
        plan = json.loads(work.plan.read_text())
        if plan["settings"] == identity and _same_text(plan["inputs"], corpus, progress):
            if progress:
                print(f"{partial}: going on with the build that was stopped", file=sys.stderr)
            return work
    shutil.rmtree(partial, ignore_errors=True)
    # Before the text is read, so that a change meanwhile is noticed next time.
    write_json(work.plan, {"settings": identity, "inputs": {"stamp": corpus.stamp(), "digest": _digest(corpus, progress)}})
    return work


def _write(partial: Path, work: Workshop, settings: DataSettings, corpus: Corpus, progress: bool) -> dict[str, Any]:
    """Write tokenizer and shards; return the manifest."""
    with workers(_worker_count(settings, corpus)) as run:
        _read_benchmarks(work, settings)
        _read(work, settings, corpus, run, progress)
        verdicts = judge(work, settings.clean)
        with bar("scoring", work.tally.bytes, progress and settings.clean.filter is not None) as advance:
            keep_best(work, verdicts, settings.clean, advance)
        cleaning = write_removed(work, verdicts, partial / REMOVED, settings.clean)
        tokenizer = _tokenizer(partial, work, verdicts, settings, progress)
        writers = _pack(partial, work, verdicts, settings, tokenizer, run, progress)
    tally = work.tally
    manifest = {
        "settings": _identity(settings),
        "inputs": json.loads(work.plan.read_text())["inputs"],
        "read": {key: value for key, value in asdict(tally).items() if key not in ("unit", "item")},
        "cleaning": cleaning,
        "short": _short(settings, tally, sum(writer.tokens for writer in writers.values())),
        "tokenizer": {"sha256": tokenizer_hash(tokenizer), "vocab_size": entries(tokenizer), "end_of_text_id": tokenizer.eos_token_id},
        "dtype": dtype_of(entries(tokenizer)).str,
        "splits": {name: writer.entry() for name, writer in writers.items()},
        "versions": _versions(),
    }
    return manifest | {"fingerprint": fingerprint(manifest)}


def _short(settings: DataSettings, tally: Tally, tokens: int) -> dict[str, dict[str, int]]:
    """The limits that the text ended before, with what was asked for and what there was."""
    read = {"limit_documents": (settings.limit_documents, tally.documents), "limit_bytes": (settings.limit_bytes, tally.bytes)}
    if is_full(settings, tally):  # one of the limits ended the reading, not the text
        read = {}
    return {
        key: {"asked": asked, "found": found}
        for key, (asked, found) in {**read, "limit_tokens": (settings.limit_tokens, tokens)}.items()
        if asked is not None and found < asked
    }


def _worker_count(settings: DataSettings, corpus: Corpus) -> int:
    if settings.workers is not None:
        return settings.workers
    return 1 if corpus.size is not None and corpus.size <= SMALL_BYTES else cores()


def _read_benchmarks(work: Workshop, settings: DataSettings) -> None:
    if settings.clean.benchmarks is not None and not (work.folder / "benchmarks.json").is_file():
        write_json(work.folder / "benchmarks.json", write_benchmarks(settings.clean.benchmarks, work.folder / BENCHMARKS))


def _read(work: Workshop, settings: DataSettings, corpus: Corpus, run: Run, progress: bool) -> None:
    """Put the documents down in blocks, from where an earlier reading got to."""
    if work.read.is_file():
        return
    blocks, tally = _blocks_there(work)
    with bar("reading", corpus.size, progress) as advance:
        advance(tally.bytes)
        found = in_blocks(documents(settings, corpus, tally), tally)
        jobs = ((work, number, *block, settings.clean) for number, block in enumerate(found, len(blocks)))
        done = tally.bytes
        for count, after in run(stage, jobs):
            blocks.append(count)
            advance(after.bytes - done)
            done = after.bytes
    write_json(work.read, {"blocks": blocks, "tally": asdict(tally)})


def _blocks_there(work: Workshop) -> tuple[list[int], Tally]:
    """How many documents each block has that is there, up to the first gap, and how far the reading is after the last of them."""
    blocks, tally = list[int](), Tally()
    while (after := work.tally_after(len(blocks))) is not None:
        blocks.append(after.documents - tally.documents)
        tally = after
    return blocks, tally


def _tokenizer(partial: Path, work: Workshop, verdicts: Verdicts, settings: DataSettings, progress: bool) -> PreTrainedTokenizerFast:
    """The tokenizer, saved in the folder, and in the workshop as the workers read it."""
    if (work.folder / ENCODER).is_file():
        return load_tokenizer(str(partial / TOKENIZER))
    tokenizer = _trained(work, verdicts, settings, progress) if settings.tokenizer is None else load_tokenizer(settings.tokenizer)
    save_tokenizer(tokenizer, partial / TOKENIZER)
    write_text(work.folder / ENCODER, write_encoder(tokenizer))
    return tokenizer


def _trained(work: Workshop, verdicts: Verdicts, settings: DataSettings, progress: bool) -> PreTrainedTokenizerFast:
    with bar("training the tokenizer", min(work.tally.bytes, TRAINING_BYTES), progress) as advance:
        texts = _training_texts(work, verdicts, settings, advance)
        return train_tokenizer(texts, vocab_size=settings.vocab_size, model_max_length=settings.model_max_length)


def _training_texts(work: Workshop, verdicts: Verdicts, settings: DataSettings, advance: Advance) -> Iterator[str]:
    seen = 0
    for number in range(len(work.blocks)):
        for name, text, kept in zip(work.names(number), work.texts(number), verdicts.kept(number), strict=True):
            if kept and not is_validation(name, settings):
                yield text
                advance(size := len(text.encode()))
                seen += size
            if seen >= TRAINING_BYTES:
                return
    if not seen:
        raise _too_little(settings, "training")


def _pack(
    partial: Path,
    work: Workshop,
    verdicts: Verdicts,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerFast,
    run: Run,
    progress: bool,
) -> dict[str, ShardWriter]:
    from outgrow.train.data.listing import LISTING, listing  # imports pyarrow, which opening a folder does without

    dtype = dtype_of(entries(tokenizer))
    with bar("tokenising", work.tally.bytes, progress) as advance, listing(work, partial / LISTING) as listed:

        def record(number: int, taken: Lengths) -> None:
            listed.add(number, taken)
            advance(int(taken.bytes.sum()))

        writers = pack(partial, work, verdicts.kept, settings, dtype, tokenizer.eos_token_id, run, record)
    for name, writer in writers.items():
        if not writer.documents:
            raise _too_little(settings, "training" if name == "train" else name)
    return writers


def _too_little(settings: DataSettings, split: str) -> UserError:
    return UserError(
        f"data {settings.name!r}: not one {split} document in the text; "
        f"give more documents, or change data.validation_fraction={settings.validation_fraction}"
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("tokenizers", "transformers")}}
