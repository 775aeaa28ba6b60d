"""Documents of a Hugging Face dataset, streamed or downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from outgrow.model.base.errors import UserError, kind_and_line
from outgrow.train.corpus.read.document import Document, Tally
from outgrow.train.corpus.read.files import hash_of
from outgrow.train.corpus.read.formats import text_of
from outgrow.train.data.settings import DataSettings

NAMED = ("dataset", "config", "data_dir", "split", "revision")


@dataclass(frozen=True)
class Hub:
    """A dataset is what its name and revision say: once the tokens are there, no network is needed. A local
    folder is looked at again."""

    settings: DataSettings

    def documents(self, tally: Tally) -> Iterator[Document]:
        column = self.settings.column
        for row in self._rows(tally.item):
            settings = self.settings
            name = f"{settings.dataset}:{settings.split}:{tally.item}"
            if column not in row:
                names = ", ".join(row) or "none"
                raise UserError(
                    f"{name}: no column {column!r}; found {names}; name the one with the text: "
                    "data.column=NAME"
                )
            tally.item += 1
            tally.records += 1
            yield from tally.document(
                name, text_of(row[column], column, name), self.settings.max_document_bytes
            )

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        own = self.settings
        try:
            from datasets import load_dataset

            selection = {"data_dir": own.data_dir, "split": own.split, "revision": own.revision}
            rows = load_dataset(own.dataset, own.config, **selection, streaming=own.streaming)
            yield from rows.skip(start) if start else rows
        except Exception as error:  # datasets, fsspec, pyarrow and the hub's client each raise their own
            values = {key: getattr(own, key) for key in NAMED}
            named_values = {key: value for key, value in values.items() if value}
            named = " ".join(f"{key}={value}" for key, value in named_values.items())
            raise UserError(
                f"cannot read {named} from the Hugging Face hub ({kind_and_line(error)}); check "
                "the names and the network, log in with `hf auth login` where it is gated, "
                "or read files of your own with data=files data.path=FOLDER"
            ) from error

    def stamp(self) -> str:
        """A hash of the name and revision; of a local folder, of its files' sizes and times too."""
        values = asdict(self.settings)
        named = [values[key] for key in NAMED if key != "data_dir"]
        if values["data_dir"]:
            named.append(values["data_dir"])
        folder = os.path.expanduser(self.settings.dataset or "")
        return hash_of([*named, *_files_of(folder)])


def _files_of(folder: str) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of each file of a local dataset; none of one on the hub."""
    for directory, inner, names in os.walk(folder):
        inner.sort()
        paths = [os.path.join(directory, name) for name in sorted(names)]
        for path in paths:
            status = os.stat(path)
            name = os.path.relpath(path, folder)
            yield name, status.st_size, status.st_mtime_ns
