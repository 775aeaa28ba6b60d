"""Near copies across the split: how much of the validation text has a near copy in the training text, where
nothing removes near duplicates.

Similarity is the Jaccard similarity of sets of 5-word shingles, as duplicates.py has it, here counted and not
estimated. Exact copies lie on one side, for the split goes by a hash of the text. A large corpus is looked
at in part: the first documents of each task, some LOOK_BYTES together, whatever its size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from outgrow.train.corpus.duplicates import SHINGLE_WORDS
from outgrow.train.corpus.progress import say
from outgrow.train.corpus.tokenise import Split, kept_rows
from outgrow.train.corpus.verdicts import Verdicts
from outgrow.train.corpus.words import ngrams, word_hashes, words
from outgrow.train.corpus.workshop import Workshop

SIMILARITY = 0.8
LOOK_BYTES = 2**23  # of text that is looked at: a second of one core
LOOK_DOCUMENTS = 2**15


@dataclass(frozen=True)
class NearCopies:
    """Validation documents, those of them that have a near copy in training, and how much was looked at."""

    validation_documents: int
    near_training: int
    similarity: float
    words: str
    looked_at: float  # share of the text

    def warning(self) -> str:
        """One line for a person; empty where nothing is near."""
        if not self.near_training:
            return ""
        share = self.near_training / self.validation_documents
        part = "" if self.looked_at == 1 else f" (looked for in {self.looked_at:.1%} of the text)"
        return (
            f"validation: {self.near_training:,} of {self.validation_documents:,} documents, {share:.1%}, "
            f"have a near copy in training, of a similarity of {self.similarity:g} or more{part}, so their "
            f"loss is too low; data.clean.near_duplicates={self.similarity:g} removes near copies"
        )


def near_across(work: Workshop, verdicts: Verdicts, split: Split, kind: str) -> dict[str, Any]:
    """Measure it, tell it, and return it for the manifest; nothing where one document is cut for both sides.

    Args:
        kind: what a word is (train/corpus/words.py).
    """
    if split.cut:
        return {}
    held_out: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    tasks = len(work.counts)
    bytes_left = documents_left = 0
    looked_at = 0
    for task in range(tasks):
        bytes_left += LOOK_BYTES // tasks
        documents_left += LOOK_DOCUMENTS // tasks
        for row in kept_rows(work, verdicts, task):
            if bytes_left <= 0 or documents_left <= 0:
                break
            bytes_left -= row.bytes
            documents_left -= 1
            looked_at += row.bytes
            text_words = words(row.text, kind)
            if text_words:
                ((_, validation),) = split.parts(row.document)
                shingles = np.unique(ngrams(word_hashes(text_words), SHINGLE_WORDS))
                (held_out if validation else trained).append(shingles)
    near = have_near(held_out, trained, SIMILARITY)
    total = 0
    for task in range(tasks):
        kept_sizes = work.sizes(task)[verdicts.kept(task)]
        total += int(kept_sizes.sum())
    share = looked_at / total
    copies = NearCopies(len(held_out), int(near.sum()), SIMILARITY, kind, share)
    if warning := copies.warning():
        say(warning)
    return {"near_copies_across": asdict(copies)}


def have_near(held_out: list[np.ndarray], trained: list[np.ndarray], threshold: float) -> np.ndarray:
    """Mark the documents held out that have a Jaccard similarity of `threshold` or more with one that is
    trained on. bool (held out,).

    Args:
        held_out, trained: of each document its different shingles, uint64 (s,), ascending.
    """
    near = np.zeros(len(held_out), bool)
    if not held_out:
        return near
    sizes = np.array([len(shingles) for shingles in held_out])
    # every shingle that is held out, with the document it is of: one index, in the order of shingles
    owners = np.repeat(np.arange(len(held_out)), sizes)
    every = np.concatenate(held_out)
    order = np.argsort(every, kind="stable")
    every = every[order]
    owners = owners[order]
    for shingles in trained:
        # Every place in the index of every shingle: runs of `counts` places that begin at `first`.
        first = np.searchsorted(every, shingles)
        last = np.searchsorted(every, shingles, side="right")
        counts = last - first
        before = np.cumsum(counts) - counts  # hits of the shingles before
        offsets = np.repeat(first - before, counts)
        hits = offsets + np.arange(len(offsets))
        common = np.bincount(owners[hits], minlength=len(held_out))
        union = sizes + len(shingles) - common
        near |= common >= threshold * union
    return near
