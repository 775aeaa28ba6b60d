"""Batches: every window once per epoch, and nothing but (seed, step) decides which."""

from __future__ import annotations

import numpy as np
import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.data.batches import batch, permuted, validation_batches, window_count
from outgrow.train.data.shards import Tokens, TokenSplit


def make_split(count: int, shard: int | None = None) -> TokenSplit:
    """Token i has id i."""
    ids = np.arange(count, dtype=np.uint16)
    return TokenSplit(
        "train",
        Tokens(np.split(ids, range(shard, count, shard)) if shard else [ids]),
        documents=1,
        bytes=count,
    )


def first_tokens(split: TokenSplit, steps: range, **settings: int) -> list[int]:
    return [int(row[0]) for step in steps for row in batch(split, step=step, **settings)]  # type: ignore[arg-type]


# ---- the permutation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(1, 66), 255, 256, 257, 1000, 4097])
def test_every_index_comes_once(size: int) -> None:
    for key in (0, 1):
        assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


def test_an_index_is_permuted_on_its_own() -> None:
    size = 10**12
    index = np.array([[0, 1, 2], [size - 1, size // 2, 7]])
    together = permuted(index, size, 3, 4)
    assert together.shape == index.shape
    assert together.tolist() == [
        [int(permuted(np.array([i]), size, 3, 4)[0]) for i in row] for row in index.tolist()
    ]
    assert ((together >= 0) & (together < size)).all()


def test_the_permutation_of_a_key_never_changes() -> None:
    """Runs resume on it: other numbers here mean that every run's data order has changed."""
    assert permuted(np.arange(12), 12, 0, 0).tolist() == [5, 3, 4, 6, 2, 0, 7, 8, 9, 1, 11, 10]
    assert permuted(np.arange(3), 10**12, 0, 0).tolist() == [203008570081, 745447058049, 792563241330]


def test_the_order_looks_drawn() -> None:
    size = 10_000
    orders = [permuted(np.arange(size), size, *key) for key in ((0, 0), (0, 1), (1, 0))]
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.04  # four standard deviations
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04
        assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 12  # two are expected
        assert not any((order == other).mean() > 0.002 for other in orders[:i])


def test_large_permutations_spread_evenly_without_repeats() -> None:
    size = 10**12 + 39
    found = permuted(np.arange(10**5) + 10**11, size, 5)
    assert len(np.unique(found)) == 10**5
    counts = np.histogram(found, bins=10, range=(0, size))[0]
    assert (np.abs(counts - 10**4) < 500).all()  # five standard deviations


# ---- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [None, 5, 16, 37])
def test_a_row_is_a_window_and_windows_meet_in_one_token(shard: int | None) -> None:
    split = make_split(100, shard)
    rows = batch(split, seed=0, step=0, batch_size=12, context=8)
    assert (rows.dtype, rows.shape, window_count(split, 8)) == (np.int64, (12, 9), 12)
    assert (np.diff(rows, axis=1) == 1).all()
    assert sorted(rows[:, 0].tolist()) == list(range(0, 96, 8))


@pytest.mark.parametrize("batch_size", [1, 3, 5, 30])
def test_every_window_comes_once_per_epoch_whatever_the_batch_size(batch_size: int) -> None:
    split, windows = make_split(100), 12
    drawn = first_tokens(split, range(60 // batch_size), seed=3, batch_size=batch_size, context=8)
    epochs = [drawn[i : i + windows] for i in range(0, 60, windows)]
    assert all(sorted(epoch) == list(range(0, 96, 8)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5  # each epoch its own order
    assert drawn == first_tokens(split, range(60), seed=3, batch_size=1, context=8)


def test_another_seed_is_another_order() -> None:
    orders = [
        first_tokens(make_split(1000), range(1), seed=seed, batch_size=99, context=10) for seed in range(4)
    ]
    assert len(set(map(tuple, orders))) == 4


def test_shares_of_a_batch_are_the_batch() -> None:
    split, settings = make_split(1000, 64), {"seed": 1, "step": 41, "batch_size": 7, "context": 10}
    whole = batch(split, **settings)
    shares = [
        batch(split, **settings, start=start, stop=stop)
        for start, stop in ((0, 0), (0, 3), (3, 5), (5, None))
    ]
    assert [len(share) for share in shares] == [0, 3, 2, 2]
    assert (np.concatenate(shares) == whole).all()


def test_validation_windows_are_fixed_and_spread() -> None:
    split = make_split(1001, 100)
    batches = list(validation_batches(split, context=10, tokens=250, batch_size=10))
    assert [len(rows) for rows in batches] == [10, 10, 5]
    assert [int(row[0]) for rows in batches for row in rows] == list(range(0, 1000, 40))
    assert (np.diff(np.concatenate(batches), axis=1) == 1).all()
    again = validation_batches(split, context=10, tokens=255)
    assert (np.concatenate(list(again)) == np.concatenate(batches)).all()


def test_validation_takes_every_window_once_where_there_are_no_more() -> None:
    rows = np.concatenate(list(validation_batches(make_split(1001), context=10, tokens=10**9)))
    assert rows[:, 0].tolist() == list(range(0, 1000, 10))


def test_less_than_one_window_is_refused() -> None:
    assert batch(make_split(9), seed=0, step=0, batch_size=2, context=8).tolist() == [list(range(9))] * 2
    with pytest.raises(UserError, match=r"train split has 8 tokens, less than one window of 8 \+ 1"):
        batch(make_split(8), seed=0, step=0, batch_size=2, context=8)
    with pytest.raises(UserError, match=r"less than one window"):
        validation_batches(make_split(8), context=8, tokens=100)
    with pytest.raises(UserError, match=r"train\.eval_tokens: 7 is less than one window"):
        validation_batches(make_split(100), context=8, tokens=7)
