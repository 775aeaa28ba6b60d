"""`prepare`: tokens that are there and current, built if need be, by one process while the others wait.

A build works in `<folder>.partial` and renames it, so the folder is complete or absent. A build that was
stopped, by a fault or by kill −9, goes on where it was; where the input has changed meanwhile, with what is
still the same. Looking needs no datatrove, building does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from outgrow.model.base.atomic import partial_of, take_place
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import one_at_a_time, telling_disk_faults, write_json
from outgrow.model.keys import without
from outgrow.train.corpus.progress import bar, say
from outgrow.train.corpus.read.corpora import Corpus, open_corpus
from outgrow.train.corpus.read.files import Files, content_of, files_of, hash_of
from outgrow.train.corpus.settings import ExecutorSettings, executor_faults
from outgrow.train.corpus.workers import begin_imports
from outgrow.train.data.pretokenized import open_tokens
from outgrow.train.data.settings import CleaningSettings, DataSettings, disagreements, read_limit
from outgrow.train.data.shards import (
    TOKENIZER,
    TokenData,
    open_data,
    open_prepared,
    read_manifest,
    write_manifest,
)
from outgrow.train.data.tokenizer import TRAIN, tokenizer_identity, tokenizer_stamp

if TYPE_CHECKING:
    from outgrow.train.corpus.workshop import Workshop

FORMAT = 3  # of the folder; a change of what is written, or how text is read, raises it
EARLIER = (2,)  # formats that are read as well; their documents are split by name, not by text
# settings that say where and by whom, and nothing of the tokens
ELSEWHERE = ("name", "folder", "path", "workers")
# what reading does not depend on
LATER = ("tokenizer", "vocab_size", "model_max_length", "validation_fraction", "seed", "shard_tokens")
BEGUN = "begun.json"  # in the workshop: what is built
SLOW_BYTES = 2**31  # of text, that take more than a moment to hash
SMALL_BYTES = 2**26  # of text, that starting processes is not worth it for


def prepare(
    settings: DataSettings, *, progress: bool = True, executor: ExecutorSettings | None = None
) -> TokenData:
    """The tokens of `settings`, opened; built first where they are missing or the input or a setting has
    changed.

    Any number of processes may call this at once. `progress` shows bars on stderr; nothing of the result
    depends on `executor`.

    Raises:
        UserError: settings that cannot work, text that cannot be read, a split without documents, a damaged
        folder, a full disk.
    """
    if settings.tokenizer == TRAIN:
        settings = replace(settings, tokenizer=None)
    executor = executor or ExecutorSettings()
    UserError.collect(disagreements(settings) + executor_faults(executor))
    if settings.corpus == "tokens":
        return open_tokens(settings, progress=progress)
    folder = settings.home
    if settings.corpus == "prepared":
        return open_prepared(folder)
    corpus = open_corpus(settings)
    if _outdated(folder, settings, corpus, progress):
        with one_at_a_time(folder):
            # not built by another while we waited
            if reason := _outdated(folder, settings, corpus, progress):
                if progress:
                    say(f"{folder}: {reason}")
                _build(folder, settings, corpus, executor, progress)
    return open_data(folder)


def cut_by(settings: DataSettings, tokenizer: Path) -> DataSettings:
    """The text of `settings`, cut by the tokenizer in a folder, in a folder of its own; what is there already
    serves where it is the same.

    Raises:
        UserError: the tokenizer cannot be loaded, or the tokens were cut by another and their text is not
            there.
    """
    identity = tokenizer_identity(str(tokenizer))
    own_tokenizer = settings.home / TOKENIZER
    is_same = own_tokenizer.is_dir() and tokenizer_identity(str(own_tokenizer)) == identity
    if settings.corpus == "prepared":
        if not is_same:
            raise UserError(
                f"data.path={settings.path}: cut by another tokenizer than the source's, {tokenizer}; "
                "prepare the text for it where the text is: outgrow corpus prepare data=NAME "
                f"data.tokenizer={tokenizer}"
            )
        return settings
    if is_same:
        corpus = open_corpus(settings)
        if _outdated(settings.home, settings, corpus, progress=False) is None:
            return settings
    digest = str(identity)[:8]
    folder = settings.folder or f"{settings.home}-{digest}"
    return replace(settings, tokenizer=str(tokenizer), folder=folder)


def _outdated(folder: Path, settings: DataSettings, corpus: Corpus, progress: bool) -> str | None:
    """The reason why the folder has to be built; None where it is current."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "building the tokens"
    before = dict(manifest["settings"])
    identity = _identity(settings)
    if before.get("format") in EARLIER:  # stays as it is, split by names, until something else changes
        before |= {
            "format": FORMAT,
            "max_broken": identity["max_broken"],
            "clean": {**before["clean"], "words": identity["clean"]["words"]},
        }
    changed = [key for key in identity if before.get(key) != identity[key]]
    if changed:
        lines = [f"{key} {before.get(key)} → {identity[key]}" for key in changed]
        changes = ", ".join(lines)
        return f"building the tokens again, for settings changed: {changes}"
    if not _same_text(manifest["inputs"], corpus, progress):
        return "building the tokens again, for the text has changed"
    return None


def _same_text(inputs: dict[str, Any], corpus: Corpus, progress: bool) -> bool:
    """Check whether a corpus still has the text that a manifest's `inputs` tell of."""
    if inputs["stamp"] == corpus.stamp():  # needs no reading
        return True
    if not isinstance(corpus, Files):  # of a stream, nothing else is known
        return False
    size = corpus.size
    contents = []
    with bar("comparing the text", size, progress and size >= SLOW_BYTES) as advance:
        for file in corpus.files[: inputs.get("files")]:
            contents.append(content_of(file))
            advance(file.size)
    return bool(inputs["digest"] == hash_of(contents))


def _identity(
    settings: DataSettings, of_tokenizer: Callable[[str | None], Any] = tokenizer_identity
) -> dict[str, Any]:
    """Everything but the text that decides what is written, as JSON has it: a manifest is held against it.

    Args:
        of_tokenizer: tells the tokenizer of a name from others.
    """
    values = asdict(settings)
    for key in ELSEWHERE:
        del values[key]
    clean = values["clean"]
    if settings.clean.benchmarks is not None:
        benchmarks = files_of(settings.clean.benchmarks, "data.clean.benchmarks")
        clean["benchmarks"] = hash_of(map(content_of, benchmarks))
    if settings.clean.filter is not None:
        from outgrow.train.corpus.filter.forest import filter_identity

        clean["filter"] = filter_identity(settings.clean.filter)
    clean.pop("encoder")  # where it lies; which one it is, the filter says
    if settings.clean.near_duplicates is None:  # nothing else is compared by these words
        clean["words"] = CleaningSettings.words
    values["tokenizer"] = of_tokenizer(settings.tokenizer)
    identity = json.dumps({"format": FORMAT, **values})
    return cast(dict[str, Any], json.loads(identity))


# ---- building ----------------------------------------------------------------------------------------------


def _build(
    folder: Path, settings: DataSettings, corpus: Corpus, executor: ExecutorSettings, progress: bool
) -> None:
    from outgrow.train.corpus.report import short_lines

    partial = partial_of(folder)
    with telling_disk_faults(folder):
        if not _is_current(partial, settings, corpus, progress):
            _make(partial, settings, corpus, executor, progress)
        shutil.rmtree(partial / "work", ignore_errors=True)
        take_place(folder)
    for line in short_lines(read_manifest(folder)) if progress else ():
        say(f"{folder}: {line}")


def _is_current(partial: Path, settings: DataSettings, corpus: Corpus, progress: bool) -> bool:
    """Check for a folder that needs only its new name: killed between the manifest and that."""
    if not (partial / "manifest.json").is_file():
        return False
    return _outdated(partial, settings, corpus, progress) is None


def _make(
    partial: Path, settings: DataSettings, corpus: Corpus, executor: ExecutorSettings, progress: bool
) -> None:
    """Go through the pipeline, and write the manifest last."""
    workers = _worker_count(settings, corpus)
    if executor.executor == "local":
        begin_imports(workers)  # beside those of this process
    try:
        from outgrow.train.corpus import pipeline
        from outgrow.train.corpus.executors import stages
        from outgrow.train.corpus.workshop import Workshop
    except ImportError as error:
        raise UserError(
            f"making tokens from text needs datatrove ({error}): pip install -e '.[corpus]'"
        ) from error
    work = Workshop(partial / "work")
    identity = _identity(settings, tokenizer_stamp)  # loading it takes seconds, in which others read
    begin(partial, work, identity, corpus, progress)
    with stages(executor, workers, work.stages, progress=progress) as stage:
        files = pipeline.as_files(work.fetched, settings, corpus, stage)
        plan(work, identity, read_limit(settings), files)
        manifest = pipeline.make(partial, work, settings, stage)
        inputs = pipeline.digest(work) if isinstance(corpus, Files) else {}
    begun = json.loads((work.folder / BEGUN).read_text())
    inputs = {"stamp": begun["stamp"], **inputs}
    write_manifest(partial, {"settings": _identity(settings), "inputs": inputs, **manifest})


def begin(partial: Path, work: Workshop, identity: dict[str, Any], corpus: Corpus, progress: bool) -> None:
    """Go on in what a stopped build of the same text and settings left; of another's, keep what the same
    files were read to."""
    # before reading, so that a change meanwhile is noticed next time
    stamped = {"settings": identity, "stamp": corpus.stamp()}
    record = work.folder / BEGUN
    has_ended = (partial / "manifest.json").exists()
    is_open = record.is_file() and not has_ended
    before = json.loads(record.read_text()) if is_open else None
    if before == stamped:
        if progress:
            say(f"{partial}: going on with the build that was stopped")
        return
    survivors = {work.folder}
    if before:
        survivors |= {work.folder / name for name in ("files", "text", "signatures", "overlaps")}
    present = [*partial.glob("*"), *work.folder.glob("*")]
    for path in present:
        if path not in survivors:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(record, stamped)


def plan(work: Workshop, identity: dict[str, Any], limit: int | None, files: Files) -> None:
    """Deal the files to tasks, each named by what it reads and how."""
    if work.plan.is_file():
        return
    of_reading = without(identity, LATER)
    how = [of_reading, limit]
    names = []
    for task in files.tasks:
        entries = [[file.name, file.path, file.size, file.version] for file in task]
        name = hash_of([how, entries])[:24]
        names.append(name)
        path = work.folder / "files" / f"{name}.json"
        if not path.is_file():
            write_json(path, entries)
    write_json(work.plan, {"tasks": names})


def _worker_count(settings: DataSettings, corpus: Corpus) -> int:
    from outgrow.model.base.machine import cores

    if settings.workers is not None:
        return settings.workers
    is_small = isinstance(corpus, Files) and corpus.size <= SMALL_BYTES
    return 1 if is_small else cores()
