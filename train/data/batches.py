"""Tokens of each step: a pure function of (seed, step), the same for every arm, world size and restart.

A split of n tokens has ⌊(n − 1) / context⌋ windows of context + 1 tokens, each starting on the last token of
the one before, so a token is predicted at most once per epoch. An epoch is a keyed permutation of the
windows, computed for one index at a time: a Feistel network, walked along its cycles until it falls inside
(Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). No permutation is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.train.data.mixture import Mixture
from outgrow.train.data.shards import TokenSplit

ROUNDS = 6
EVALUATION_TOKENS = 4096  # in one validation batch, where its size is not given


def permuted(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """The numbers to which a permutation of [0, size) takes each `index`; `key` chooses the permutation.

    Args:
        index: integers in [0, size), any shape.
        size: up to 2**62.
    """
    bits = (size - 1).bit_length()
    half = max(1, (bits + 1) // 2)
    text = ",".join(map(str, key))
    digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS)
    keys = np.frombuffer(digest.digest(), "<u8")
    numbers = np.asarray(index, np.uint64)
    result = _feistel(numbers, half, keys)
    while (outside := result >= size).any():  # the network covers less than 4 · size numbers: a few turns
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(index: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 4 ** half): each round adds a hash of one half to the other."""
    bits = np.uint64(half)
    mask = np.uint64(2**half - 1)
    left = index >> bits
    right = index & mask
    for i in range(ROUNDS):
        keyed = right ^ keys[i : i + 1]
        hashed = _mixed(keyed) & mask
        left, right = right, left ^ hashed
    return (left << bits) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """A hash of 64 bits (splitmix64's finaliser), modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def window_count(split: TokenSplit | Mixture, context: int) -> int:
    """The number of windows that an epoch has.

    Raises:
        UserError: not one.
    """
    if split.count <= context:
        raise UserError(
            f"the {split.name} split has {split.count} tokens, less than one window of {context} + 1; "
            "give more text, change data.validation_fraction, or lower train.context"
        )
    return (split.count - 1) // context


def batch(
    split: TokenSplit | Mixture,
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    start: int = 0,
    stop: int | None = None,
) -> np.ndarray:
    """Rows [start, stop) of the global batch of `step`; a batch may reach into the next epoch.

    Of a mixture, each row is the next window of the source whose turn it is: see train/data/mixture.py.

    Args:
        batch_size: windows in the global batch, over all processes.
        stop: None for all that follow `start`.

    Returns:
        int64, (stop - start, context + 1).

    Raises:
        UserError: the split has fewer tokens than one window.
    """
    stop = batch_size if stop is None else stop
    rows_of_batch = np.arange(start, stop, dtype=np.int64)
    index = step * batch_size + rows_of_batch
    if isinstance(split, TokenSplit):
        return _drawn(split, index, context, seed)
    shape = (len(index), context + 1)
    rows = np.empty(shape, np.int64)
    for share in split.shares(index):
        windows = _drawn(share.split, share.draws, context, seed, share.key)
        rows[share.rows] = windows
    return rows


def _drawn(split: TokenSplit, draws: np.ndarray, context: int, *key: int) -> np.ndarray:
    """The windows that come at the positions `draws` of the endless sequence of epochs, each in its own
    order."""
    windows = window_count(split, context)
    epochs, positions = np.divmod(draws, windows)
    chosen = np.empty_like(draws)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        own = positions[here]
        chosen[here] = permuted(own, windows, *key, int(epoch))
    return _read(split, chosen, context)


def validation_batches(
    split: TokenSplit, *, context: int, tokens: int, batch_size: int | None = None
) -> Iterator[np.ndarray]:
    """Fixed windows spread evenly over the split, in order, together ⌊tokens / context⌋ of them, or all there
    are.

    Args:
        tokens: to be predicted.
        batch_size: windows in one batch; None for some 4,096 tokens.

    Yields:
        int64, (≤ batch_size, context + 1).

    Raises:
        UserError: the split, or `tokens`, is less than one window.
    """
    windows = window_count(split, context)
    count = min(windows, tokens // context)
    if count == 0:
        raise UserError(
            f"train.eval_tokens: {tokens} is less than one window of train.context={context} tokens; raise it"
        )
    size = batch_size or max(1, EVALUATION_TOKENS // context)
    numbers = np.arange(count, dtype=np.int64)
    chosen = numbers * windows // count
    firsts = range(0, count, size)
    return (_read(split, chosen[first : first + size], context) for first in firsts)


def _read(split: TokenSplit, windows: np.ndarray, context: int) -> np.ndarray:
    """The ids of these windows, int64 (windows, context + 1)."""
    length = context + 1
    shape = (len(windows), length)
    rows = np.empty(shape, np.int64)
    for row, window in zip(rows, windows.tolist(), strict=True):
        first = window * context
        row[:] = split.tokens[first : first + length]
    return rows
