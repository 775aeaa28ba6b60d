"""Sources of documents, in a fixed order. A new kind of corpus is one entry of CORPORA, a new file format one
of formats.READERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from outgrow.model.base.errors import UserError
from outgrow.train.corpus.read import files
from outgrow.train.corpus.read.document import Document, Tally
from outgrow.train.corpus.read.files import Files
from outgrow.train.corpus.read.hub import Hub
from outgrow.train.corpus.synthetic.corpus import Generated
from outgrow.train.data.settings import DataSettings, read_limit


class Stream(Protocol):
    """A corpus without files: it is written down as files first (`fetch`), which then are read as any
    others."""

    def documents(self, tally: Tally) -> Iterator[Document]:
        """Every document from the tally's place on."""

    def stamp(self) -> str:
        """A hash that changes if and only if a document may have changed."""


Corpus = Files | Stream
CORPORA: dict[str, Callable[[DataSettings], Corpus]] = {
    "stdlib": files.stdlib,
    "files": files.files,
    "packages": files.packages,
    "hub": Hub,
    "exercises": Generated,
    "textbooks": Generated,
}


def open_corpus(settings: DataSettings) -> Corpus:
    """The corpus that `settings` name; nothing is read yet.

    Raises:
        UserError: there is no such file, or no text in it.
    """
    if settings.corpus in ("tokens", "prepared"):
        raise UserError(
            f"data.corpus={settings.corpus}: these are token ids, without a text to label, score or clean; "
            "give their text as data"
        )
    return CORPORA[settings.corpus](settings)


def documents(settings: DataSettings, corpus: Corpus, tally: Tally | None = None) -> Iterator[Document]:
    """The documents of `corpus`, one after another in this process, normalised as preparing them would, up to
    the limits; the one that reaches limit_bytes is the last.

    Raises:
        UserError: a file, or more than data.max_broken of the records, cannot be read.
    """
    tally = tally or Tally()
    if is_full(settings, tally):
        return
    normalise = settings.clean.normalise
    if normalise:
        from outgrow.train.corpus.normalise import normalised
    for document in corpus.documents(tally):
        yield document._replace(text=normalised(document.text)) if normalise else document
        if is_full(settings, tally):
            break
    tally.check_broken(settings.max_broken)


def is_full(settings: DataSettings, tally: Tally) -> bool:
    """Check whether a limit ends the reading here."""
    most = settings.limit_documents
    size = read_limit(settings)
    if most is not None and tally.documents >= most:
        return True
    return size is not None and tally.bytes >= size
