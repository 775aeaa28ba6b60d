"""Runs of words as numbers: what near duplicates and overlaps with benchmarks are found by."""

from __future__ import annotations

import re

import numpy as np

_WORD = re.compile(r"\w+")
_FACTOR = 0x9E3779B97F4A7C15  # odd: multiplying by it is a bijection on 64 bits


def words(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and underscores; punctuation and spacing play no part."""
    return _WORD.findall(text.lower())


def word_hashes(found: list[str]) -> np.ndarray:
    """64 bits for each word, the same on every machine. uint64, 1-D."""
    import xxhash

    known = {word: xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass")) for word in set(found)}
    return np.fromiter((known[word] for word in found), np.uint64, len(found))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash of each `n` consecutive words; of all of them together where there are fewer. uint64, (max(1, w - n + 1),)."""
    n = min(n, len(hashes))
    result = np.zeros(len(hashes) - n + 1, np.uint64)
    for i in range(n):
        result = result * np.uint64(_FACTOR) + hashes[i : len(hashes) - n + 1 + i]
    return result
