"""What a corpus is made of, and the one who counts while it is read."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    """One text of a corpus."""

    name: str  # unique in the corpus; decides the split
    text: str
    bytes: int  # of the text in UTF-8


@dataclass
class Tally:
    """What was read, what was not taken as it stood, and how far the reading is: all that it takes to go on after a kill.

    It ends up in the manifest, apart from the place.
    """

    empty_skipped: int = 0
    utf8_replaced: int = 0  # documents in which broken UTF-8 became U+FFFD
    too_long_skipped: int = 0  # larger than data.max_document_bytes
    programs_failed: int = 0  # generated documents left out because their program did not do what the text says
    documents: int = field(default=0, compare=False)  # taken
    bytes: int = field(default=0, compare=False)  # of their text
    unit: int = field(default=0, compare=False)  # the place: files (or streams) that are done,
    item: int = field(default=0, compare=False)  # and texts taken from the next one

    def decode(self, raw: builtins.bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.utf8_replaced += 1
            return raw.decode(errors="replace")

    def document(self, name: str, text: str, limit: int) -> Iterator[Document]:
        """`text` as a document; nothing, but counted, where it is empty or has more than `limit` bytes."""
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
            raw = text.encode(errors="replace")
            text, self.utf8_replaced = raw.decode(), self.utf8_replaced + 1
        if not text.strip():
            self.empty_skipped += 1
        elif len(raw) > limit:
            self.too_long_skipped += 1
        else:
            self.documents += 1
            self.bytes += len(raw)
            yield Document(name, text, len(raw))


class Corpus(Protocol):
    """A stream of documents that knows its size and how to tell that it changed."""

    @property
    def size(self) -> int | None:
        """Bytes to read, where that is known."""

    def documents(self, tally: Tally) -> Iterator[Document]:
        """Every document from the tally's place on, in a fixed order. Raises UserError for what cannot be read."""

    def stamp(self) -> str:
        """A hash that is cheap and may change without need; when it is the same, nothing has changed."""

    def digest(self, advance: Callable[[int], None]) -> str:
        """A hash that changes if and only if a document may have changed; `advance` is told the bytes read for it."""
