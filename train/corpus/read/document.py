"""Documents as readers hand them on, and the one who counts while they are read."""

from __future__ import annotations

import builtins
import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from outgrow.model.base.errors import UserError

MARKS = {  # byte order marks, the longer first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
PLACES = 5  # broken records that are named
MANY = 100  # broken records, at which a reading ends early if they are most of it


class Document(NamedTuple):
    """One text of a corpus."""

    name: str
    text: str
    bytes: int  # of the text in UTF-8


@dataclass
class Tally:
    """A count of what was read and of what was not taken as it stood, and how far the reading of a stream is:
    all that it takes to go on after a kill.

    It ends up in the manifest, apart from the place.
    """

    empty_skipped: int = 0
    utf8_replaced: int = 0  # documents in which broken UTF-8 became U+FFFD
    too_long_skipped: int = 0  # larger than data.max_document_bytes
    binary_skipped: int = 0  # files that hold no text: NUL bytes, or mostly bytes that are no UTF-8
    broken_skipped: int = 0  # records that cannot be read, up to data.max_broken of all
    # generated documents left out because their program did not do what the text says
    programs_failed: int = 0
    documents: int = field(default=0, compare=False)  # taken
    bytes: int = field(default=0, compare=False)  # of their text
    records: int = field(default=0, compare=False)  # looked at, taken or not
    item: int = field(default=0, compare=False)  # the place in a stream: texts taken from it
    # what is wrong with the first of those that cannot be read
    broken: list[str] = field(default_factory=list, compare=False)

    def decode(self, raw: builtins.bytes) -> str:
        """UTF-8, or what a byte order mark says; broken bytes become U+FFFD and are counted."""
        marked = [name for mark, name in MARKS.items() if raw.startswith(mark)]
        encoding = marked[0] if marked else "utf-8"
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            self.utf8_replaced += 1
            return raw.decode(encoding, errors="replace")

    def skip_broken(self, fault: UserError) -> None:
        """Count a record that cannot be read; who reads decides at the end whether they are too many
        (`check_broken`)."""
        self.broken_skipped += 1
        if len(self.broken) < PLACES:
            self.broken = [*self.broken, str(fault)]
        mostly_broken = 2 * self.broken_skipped > self.records
        if self.broken_skipped >= MANY and mostly_broken:
            self.check_broken(0.5)  # at once: most of it is something else

    def check_broken(self, most: float) -> None:
        """Refuse a reading in which more than the share `most` of the records was broken.

        Raises:
            UserError: it is so; the first of them are named.
        """
        if self.broken_skipped > most * self.records:
            more = (
                f"\n… {self.broken_skipped - len(self.broken)} more"
                if self.broken_skipped > len(self.broken)
                else ""
            )
            share = f"{self.broken_skipped:,} of {self.records:,} records cannot be read"
            way_out = (
                f"data.max_broken={most:g} of them may be left out"
                if most
                else "data.max_broken=0.001 leaves out up to that share"
            )
            faults = "\n".join(self.broken)
            raise UserError(f"{faults}{more}\n{share}; {way_out}")

    def document(self, name: str, text: str, limit: int) -> Iterator[Document]:
        """`text` as a document; nothing, but counted, where it is empty or has more than `limit` bytes."""
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
            raw = text.encode(errors="replace")
            text = raw.decode()
            self.utf8_replaced = self.utf8_replaced + 1
        if not text.strip():
            self.empty_skipped += 1
        elif len(raw) > limit:
            self.too_long_skipped += 1
        else:
            self.documents += 1
            self.bytes += len(raw)
            yield Document(name, text, len(raw))

    def add(self, other: Tally) -> None:
        """Count what another counted."""
        for key, value in vars(other).items():
            setattr(self, key, getattr(self, key) + value)
        self.broken = self.broken[:PLACES]


def is_binary(text: str) -> bool:
    """Check for a file whose bytes were no text: it holds NULs, or mostly what is no UTF-8."""
    replaced = text.count("\ufffd")
    return "\0" in text or replaced > 0.3 * len(text)
