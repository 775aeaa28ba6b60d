"""Randomness by name: the same bits for any shard size, thread count or order."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *name: object) -> np.random.Generator:
    """A generator that depends on the run's seed and a name alone."""
    digest = hashlib.blake2b("\x1f".join(map(str, (seed, *name))).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
