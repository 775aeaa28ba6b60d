"""Randomness by name and position: the same bits for any shard size, block size, thread count or order."""

from __future__ import annotations

import hashlib
from functools import cache
from statistics import NormalDist

import numpy as np

from outgrow.growth.engine.runs import runs

_PERIOD = 1 << 128  # of PCG64


def generator(seed: int, *name: object) -> np.random.Generator:
    """Make a generator that depends on the run's seed and a name alone."""
    key = _key(seed, *name)
    bits = np.random.SFC64(key)
    return np.random.Generator(bits)


def _key(seed: int, *name: object) -> int:
    words = map(str, (seed, *name))
    text = "\x1f".join(words)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


class Draws:
    """A matrix of random integers of unlimited height, of which any rows can be drawn.

    The rows follow one another in a PCG64 stream, which can jump; every row starts at a 64-bit word of its
    own. Reading rows in order is as fast as the generator.
    """

    def __init__(self, width: int, dtype: type[np.unsignedinteger], seed: int, *name: object) -> None:
        self.width = width
        self.dtype = np.dtype(dtype).newbyteorder("<")
        row_bytes = width * self.dtype.itemsize
        self._words = -(-row_bytes // 8)  # of each row
        key = _key(seed, *name)
        self._bits = np.random.PCG64(key)
        self._row = 0

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Draw the rows of these numbers: (len(rows), width)."""
        drawn = []
        for run in runs(rows):
            count = run.stop - run.start
            first = int(rows[run.start])
            drawn.append(self.rows(first, count))
        only_run = len(drawn) == 1
        return drawn[0] if only_run else np.concatenate(drawn)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Draw rows `start`, `start + 1`, …: (count, width)."""
        if start != self._row:
            skipped = (start - self._row) * self._words
            self._bits.advance(skipped % _PERIOD)
        self._row = start + count
        raw = self._bits.random_raw(count * self._words)
        words = raw.astype("<u8", copy=False)
        numbers = words.view(self.dtype)
        matrix = numbers.reshape(count, -1)
        return matrix[:, : self.width]


@cache
def quantiles() -> np.ndarray:
    """(65536,) quantiles of the standard normal distribution at the middles of equal shares, float32.

    A random 16-bit number picks a normal number that is finer than 16-bit formats are; |z| ≤ 4.33.
    """
    middles = [(share + 0.5) / 65536 for share in range(32768, 65536)]
    upper = np.array(list(map(NormalDist().inv_cdf, middles)))
    lower = -upper[::-1]
    both = np.concatenate([lower, upper])
    return both.astype(np.float32)


@cache
def _knots() -> np.ndarray:
    """(65537,) quantiles at the ends of those shares, float64; the outermost keep the last share's mean."""
    normal_numbers = NormalDist()
    upper = [normal_numbers.inv_cdf(share / 65536) for share in range(32769, 65536)]
    last_mean = normal_numbers.pdf(upper[-1]) * 65536
    upper.append(2 * last_mean - upper[-1])
    lower = -np.array(upper[::-1])
    return np.concatenate([lower, [0.0], upper])


def normal(draws: np.ndarray) -> np.ndarray:
    """Turn random 32-bit integers into standard normal numbers, float64: 16 bits choose a share, 16 the
    place.
    """
    knots = _knots()
    share = draws >> 16
    fraction = ((draws & 0xFFFF) + 0.5) / 65536
    low = knots[share]
    high = knots[share + np.uint32(1)]
    return low + (high - low) * fraction
