"""The ledger of what was written: a line a document, on disk as soon as it is there, and beside it what was
asked and what was no document.

out.jsonl             {"number", "topic", "audience", "template", "text", "model", "prompt_tokens",
                      "completion_tokens", "dollars"}
out.rejected.jsonl    the same with "fault" for "text"
out.settings.json     what was asked of whom: going on under other settings is refused
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import read_object, telling_disk_faults, whole_file, write_json
from outgrow.model.base.locks import Lock
from outgrow.train.corpus.writing.answer import Answer
from outgrow.train.corpus.writing.prompts import Prompt
from outgrow.train.corpus.writing.settings import WriteSettings, identity


class Ledger:
    """The three files of a run, opened for going on."""

    def __init__(self, settings: WriteSettings, written: BinaryIO, rejected: BinaryIO) -> None:
        self.settings = settings
        self.files = (written, rejected)
        self.done: set[int] = set()
        self.dollars = 0.0
        self.tokens: Counter[str] = Counter()
        self.uncounted = 0  # answers whose tokens nobody counted
        self.faults: Counter[str] = Counter()
        for file in self.files:
            for entry in _whole_lines(file):
                self._count(entry)

    @property
    def documents(self) -> int:
        return len(self.done) - self.faults.total()

    def add(self, prompt: Prompt, answer: Answer) -> None:
        """Note an answer, and see it on disk."""
        counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        is_fault = answer.fault is not None
        result = {"fault": answer.fault} if is_fault else {"text": answer.text}
        request = {
            "number": prompt.number,
            "topic": prompt.topic,
            "audience": prompt.audience,
            "template": prompt.template,
        }
        entry = {
            **request,
            **result,
            "model": self.settings.model,
            **counts,
            "dollars": self.settings.cost(**counts),
        }
        file = self.files[answer.fault is not None]
        with telling_disk_faults(Path(self.settings.out)):
            line = json.dumps(entry, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        self._count(entry)

    def _count(self, entry: dict[str, Any]) -> None:
        self.done.add(entry["number"])
        self.dollars += entry["dollars"]
        counts = {key: entry[key] for key in ("prompt_tokens", "completion_tokens")}
        for key, count in counts.items():
            self.tokens[key] += count or 0
        self.uncounted += None in counts.values()
        if "fault" in entry:
            self.faults[entry["fault"][:60]] += 1


@contextmanager
def open_ledger(settings: WriteSettings) -> Iterator[Ledger]:
    """Go on in the files of `settings.out`, or begin them.

    Raises:
        UserError: they were written under other settings, are damaged, are being written to, or cannot be.
    """
    out = Path(settings.out).expanduser()
    with telling_disk_faults(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_settings(settings, out)
        aside = rejected_path(out)
        with Lock(out) as lock, out.open("a+b") as written, aside.open("a+b") as rejected:
            if not lock.take():
                raise UserError(f"{out}: another process is writing it right now")
            yield Ledger(settings, written, rejected)


def rejected_path(out: Path) -> Path:
    """The file of the answers that were no documents."""
    return out.with_suffix(".rejected.jsonl")


def _check_settings(settings: WriteSettings, out: Path) -> None:
    """Write down what decides what is asked, or hold it against what an earlier run wrote."""
    path = out.with_suffix(".settings.json")
    own = json.loads(json.dumps(identity(settings)))
    if not path.exists():
        if out.exists() and out.stat().st_size:
            raise UserError(
                f"out={out}: it is there, and no {path.name} says what was asked for it; choose another out"
            )
        write_json(path, own)
        return
    there = read_object(path, f"move {out.name} and this file away to begin anew")
    own_by_key = _by_key(own)
    begun = _by_key(there)
    keys = sorted({*own_by_key, *begun})
    changed = [key for key in keys if own_by_key.get(key) != begun.get(key)]
    if changed:
        raise UserError(
            f"out={out}: it was begun with another {', '.join(changed)}; choose another out, or move it "
            "away to begin anew"
        )


def _by_key(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their whole names, those of the prompts one by one: `prompts.topics`."""
    values = dict(settings)
    prompts = values.pop("prompts", None)
    entries = prompts if isinstance(prompts, dict) else {}
    return values | {f"prompts.{key}": value for key, value in entries.items()}


ENTRY = {"number", "dollars", "prompt_tokens", "completion_tokens"}  # keys that every entry has


def _whole_lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Every entry; a last line that a kill cut off is taken away, so that its prompt is asked again."""
    file.seek(0)
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not entry.keys() >= ENTRY:
                raise ValueError("an entry of a ledger has number, dollars and tokens")
        except ValueError as error:
            raise UserError(
                f"{file.name}:{number}: damaged ({error}); remove the line, and its prompt is asked again"
            ) from error
        end += len(line)
        yield entry
    file.truncate(end)
    file.seek(0, os.SEEK_END)


def in_order(out: Path) -> None:
    """Put the lines of a finished file into the order of their numbers, so that the same answers make the
    same file."""

    def number(line: bytes) -> int:
        return int(json.loads(line)["number"])

    lines = out.read_bytes().splitlines(keepends=True)
    lines.sort(key=number)
    with whole_file(out) as partial:
        partial.write_bytes(b"".join(lines))
