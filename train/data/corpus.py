"""Where documents come from. A corpus streams them in a fixed order and can say, without reading them twice, whether it has changed.

A new kind of corpus is one entry of CORPORA, a new file format one of formats.READERS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from outgrow.train.data import files
from outgrow.train.data.document import Corpus, Document, Tally
from outgrow.train.data.hub import Hub
from outgrow.train.data.settings import DataSettings, read_limit
from outgrow.train.data.synthetic.corpus import Generated

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
        UserError: there is no such file.
    """
    return CORPORA[settings.corpus](settings)


def documents(settings: DataSettings, corpus: Corpus, tally: Tally | None = None) -> Iterator[Document]:
    """The documents of `corpus` from the tally's place on up to the limits; the one that reaches limit_bytes is the last."""
    tally = tally or Tally()
    if is_full(settings, tally):
        return
    for document in corpus.documents(tally):
        yield document
        if is_full(settings, tally):
            return


def is_full(settings: DataSettings, tally: Tally) -> bool:
    """Whether a limit ends the reading here."""
    most, size = settings.limit_documents, read_limit(settings)
    return (most is not None and tally.documents >= most) or (size is not None and tally.bytes >= size)


def is_validation(name: str, settings: DataSettings) -> bool:
    """Whether the document of this name is held out: a keyed hash, so no other document and no order plays a part."""
    key = f"validation {settings.seed}".encode()
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < settings.validation_fraction * 2**64
