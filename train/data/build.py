"""`prepare`: tokens that are there and current, built if need be, by one process while the others wait.

A build writes `<folder>.partial` and renames it, so the folder is complete or absent.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.errors import UserError
from train.data.corpus import Corpus, Document, Tally, documents, is_validation, open_corpus
from train.data.settings import DataSettings, disagreements
from train.data.shards import SPLITS, TOKENIZER, ShardWriter, TokenData, dtype_of, fingerprint, open_data, read_manifest, write_manifest
from train.data.tokenizer import encoder, entries, load_tokenizer, save_tokenizer, tokenizer_hash, tokenizer_identity, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1  # of the folder; a change of what is written, or how text is read, raises it
ELSEWHERE = ("name", "folder", "path")  # settings that say where things lie, and nothing of the tokens
SLOW_BYTES = 2**31  # of text, that take more than a moment to hash
CHUNK_BYTES = 2**22  # of text, tokenised at a time
TRAINING_BYTES = 2**28  # of text, at most, that a tokenizer is trained on: the first documents of the training part

Advance = Callable[[int], None]  # so many bytes further


def prepare(settings: DataSettings, *, progress: bool = True) -> TokenData:
    """The tokens of `settings`, opened; built first where they are missing or the input or a setting has changed.

    Any number of processes may call this at once. `progress` shows bars on stderr.

    Raises:
        UserError: settings that cannot work, text that cannot be read, a split without documents, a damaged folder, a full disk.
    """
    UserError.collect(disagreements(settings))
    folder, corpus = settings.home, open_corpus(settings)
    if _outdated(folder, settings, corpus, progress):
        with _only_one(folder):
            if reason := _outdated(folder, settings, corpus, progress):  # not built by another while we waited
                if progress:
                    print(f"{folder}: {reason}", file=sys.stderr)
                _build(folder, settings, corpus, progress)
    return open_data(folder)


def _outdated(folder: Path, settings: DataSettings, corpus: Corpus, progress: bool) -> str | None:
    """Why the folder has to be built; None where it is current."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "building the tokens"
    found, wanted = manifest["settings"], _identity(settings)
    if changed := [f"{key} {found.get(key)} → {value}" for key, value in wanted.items() if found.get(key) != value]:
        return f"building the tokens again, for settings changed: {', '.join(changed)}"
    inputs = manifest["inputs"]
    if inputs["stamp"] != corpus.stamp() and inputs["digest"] != _digest(corpus, progress):  # the first needs no reading
        return "building the tokens again, for the text has changed"
    return None


def _digest(corpus: Corpus, progress: bool) -> str:
    with _bar("comparing the text", corpus.size, progress and (corpus.size or 0) >= SLOW_BYTES) as advance:
        return corpus.digest(advance)


def _identity(settings: DataSettings) -> dict[str, Any]:
    """Everything but the text that decides what is written."""
    values = {key: value for key, value in asdict(settings).items() if key not in ELSEWHERE}
    return {"format": FORMAT, **values, "tokenizer": tokenizer_identity(settings.tokenizer)}


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    from filelock import FileLock

    lock = folder.with_name(folder.name + ".lock")
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        taken = FileLock(lock).acquire()
    with taken:
        yield


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); make room, or choose another data.folder") from error


# ---- building -------------------------------------------------------------------------------------------------------------------------


def _build(folder: Path, settings: DataSettings, corpus: Corpus, progress: bool) -> None:
    partial = folder.with_name(folder.name + ".partial")
    try:
        with _writing(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_manifest(partial, _write(partial, settings, corpus, progress))
            _replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, partial: Path) -> None:
    """Who has the replaced folder mapped goes on reading it."""
    former = folder.with_name(folder.name + ".former.partial")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        os.rename(folder, former)
    os.rename(partial, folder)
    shutil.rmtree(former, ignore_errors=True)


def _write(partial: Path, settings: DataSettings, corpus: Corpus, progress: bool) -> dict[str, Any]:
    """Write tokenizer and shards; return the manifest."""
    # Before the text is read, so that a change meanwhile is noticed next time.
    inputs = {"stamp": corpus.stamp(), "digest": _digest(corpus, progress)}
    tokenizer = _tokenizer(settings, corpus, progress)
    save_tokenizer(tokenizer, partial / TOKENIZER)
    writers, tally = _pack(partial, settings, corpus, tokenizer, progress)
    manifest = {
        "settings": _identity(settings),
        "inputs": inputs,
        "read": asdict(tally),
        "tokenizer": {"sha256": tokenizer_hash(tokenizer), "vocab_size": entries(tokenizer), "end_of_text_id": tokenizer.eos_token_id},
        "dtype": dtype_of(entries(tokenizer)).str,
        "splits": {name: writer.entry() for name, writer in writers.items()},
        "versions": _versions(),
    }
    return manifest | {"fingerprint": fingerprint(manifest)}


def _tokenizer(settings: DataSettings, corpus: Corpus, progress: bool) -> PreTrainedTokenizerFast:
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer)
    total = None if corpus.size is None else min(corpus.size, TRAINING_BYTES)
    with _bar("training the tokenizer", total, progress) as advance:
        texts = _training_texts(documents(settings, corpus), settings, advance)
        first = next(texts, None)
        if first is None:
            raise _too_little(settings, "training")
        return train_tokenizer(chain([first], texts), vocab_size=settings.vocab_size, model_max_length=settings.model_max_length)


def _training_texts(found: Iterable[Document], settings: DataSettings, advance: Advance) -> Iterator[str]:
    seen = 0
    for document in found:
        advance(document.bytes)
        if is_validation(document.name, settings):
            continue
        yield document.text
        seen += document.bytes
        if seen >= TRAINING_BYTES:
            return


def _pack(
    partial: Path, settings: DataSettings, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, progress: bool
) -> tuple[dict[str, ShardWriter], Tally]:
    dtype, tally, end = dtype_of(entries(tokenizer)), Tally(), tokenizer.eos_token_id
    writers = {name: ShardWriter(partial, name, dtype, settings.shard_tokens) for name in SPLITS}
    with _bar("tokenising", corpus.size, progress) as advance:
        for document, ids in _encoded(documents(settings, corpus, tally), tokenizer):
            split = "validation" if is_validation(document.name, settings) else "train"
            writers[split].write(np.array([*ids, end], dtype), document.bytes)
            advance(document.bytes)
            if settings.limit_tokens is not None and sum(writer.tokens for writer in writers.values()) >= settings.limit_tokens:
                break
    for name, writer in writers.items():
        writer.close()
        if not writer.documents:
            raise _too_little(settings, "training" if name == "train" else name)
    return writers, tally


def _encoded(found: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its ids; chunks of them are tokenised on all cores."""
    encode = encoder(tokenizer).encode_batch_fast
    for chunk in _chunks(found):
        encodings = encode([document.text for document in chunk], add_special_tokens=False)
        yield from ((document, encoding.ids) for document, encoding in zip(chunk, encodings, strict=True))


def _chunks(found: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in found:
        chunk.append(document)
        size += document.bytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _too_little(settings: DataSettings, split: str) -> UserError:
    return UserError(
        f"data {settings.name!r}: not one {split} document in the text; "
        f"give more documents, or change data.validation_fraction={settings.validation_fraction}"
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("tokenizers", "transformers")}}


@contextmanager
def _bar(title: str, total: int | None, shown: bool) -> Iterator[Advance]:
    """A progress bar over bytes of text, on stderr; nothing where it is not shown."""
    if not shown:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)
