"""Documents of a Hugging Face dataset, streamed or downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from outgrow.model.base.errors import UserError
from outgrow.train.data.document import Document, Tally
from outgrow.train.data.files import hash_of
from outgrow.train.data.formats import text_of
from outgrow.train.data.settings import DataSettings


@dataclass(frozen=True)
class Hub:
    """A dataset is what its name and revision say: once the tokens are there, no network is needed."""

    settings: DataSettings
    size: None = None

    def documents(self, tally: Tally) -> Iterator[Document]:
        column = self.settings.column
        for row in self._rows(tally.item):
            place = f"{self.settings.dataset}:{self.settings.split}:{tally.item}"
            if column not in row:
                found = ", ".join(row) or "none"
                raise UserError(f"{place}: no column {column!r}; found {found}; name the one with the text: data.column=NAME")
            tally.item += 1
            yield from tally.document(place, text_of(row[column], column, place), self.settings.max_document_bytes)

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        wanted = self.settings
        try:
            from datasets import load_dataset

            rows = load_dataset(wanted.dataset, wanted.config, split=wanted.split, revision=wanted.revision, streaming=wanted.streaming)
            yield from rows.skip(start) if start else rows
        except Exception as error:  # datasets, fsspec, pyarrow, httpx and the hub's client each raise their own
            named = " ".join(f"{key}={getattr(wanted, key)}" for key in ("dataset", "config", "split", "revision") if getattr(wanted, key))
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"cannot read {named} from the Hugging Face hub ({type(error).__name__}: {reason}); check the names and "
                "the network, log in with `hf auth login` where it is gated, or read files of your own with data=files data.path=FOLDER"
            ) from error

    def stamp(self) -> str:
        return hash_of([asdict(self.settings)[key] for key in ("dataset", "config", "split", "revision")])

    def digest(self, advance: Callable[[int], None]) -> str:
        return self.stamp()
