"""Words as numbers: by their n-grams near duplicates and overlaps with benchmarks are found.

A word is told per kind of text (`data.clean.words`):

prose   a run of letters, digits and underscores; in scripts that put no spaces between words (Han, Kana,
        Thai, Lao, Khmer, Burmese, Tibetan) each letter. Case, punctuation, spacing, full-width forms, soft
        hyphens and other invisible characters play no part.
code    an identifier or number, each other character that is no space, and the indentation of a line: `a+b`
        and `a-b` differ.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

# Blocks of scripts without spaces: Thai and Lao, Tibetan, Burmese, Khmer, Kana, Han with its extensions.
_SPACELESS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U000323af"
)
# marks above and below letters are no letters
_WORD = re.compile(rf"(?=\w)[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_CODE = re.compile(r"^[ \t]+(?=\S)|\w+|[^\w\s]", re.MULTILINE)
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)
# of ASCII text: bytes that are in no word as spaces, capitals as small letters. With `split`, words are found
# eight times as fast as with _WORD
_ASCII = bytes(ord(chr(i).lower()) if chr(i).isalnum() or i == ord("_") else ord(" ") for i in range(128))
_ASCII_WORDS = _ASCII + bytes(range(128, 256))
_FACTOR = 0x9E3779B97F4A7C15  # odd: multiplying by it is a bijection on 64 bits


def words(text: str, kind: str = "prose") -> list[str]:
    """The words of a text in order, spelt so that equal words are equal strings."""
    if kind == "code":
        composed = text if text.isascii() else unicodedata.normalize("NFC", text)
        return _CODE.findall(composed)
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS).decode().split()
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).lower()
    return _WORD.findall(folded)


def word_hashes(text_words: list[str]) -> np.ndarray:
    """64 bits for each word, the same on every machine. uint64, 1-D."""
    import xxhash

    hashes = {
        word: xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass")) for word in set(text_words)
    }
    return np.fromiter(map(hashes.__getitem__, text_words), np.uint64, len(text_words))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash of each `n` consecutive words; of all of them together where there are fewer. uint64, (max(1, w
    - n + 1),)."""
    n = min(n, len(hashes))
    count = len(hashes) - n + 1
    result = np.zeros(count, np.uint64)
    for i in range(n):
        shifted = hashes[i : i + count]
        result = result * np.uint64(_FACTOR) + shifted
    return result
