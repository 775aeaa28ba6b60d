"""Mixtures: whose turn a row is, counted exactly; every window once per pass; and what a mixture cannot
be."""

from __future__ import annotations

import dataclasses
import json
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare
from outgrow.train.corpus.read.steps import digest_of
from outgrow.train.corpus.tokenise import held_out
from outgrow.train.data.batches import batch
from outgrow.train.data.mixture import Mixture, apart, mix, mixed
from outgrow.train.data.settings import (
    CleaningSettings,
    DataSettings,
    MixtureSettings,
    PhaseSettings,
    SourceSettings,
    mixture_disagreements,
)
from outgrow.train.data.shards import Tokens, TokenSplit

CONTEXT = 8
WINDOWS = {"web": 40, "books": 15, "code": 7}
UNUSED = DataSettings(name="unused", corpus="stdlib")


def make_split(first: int, windows: int) -> TokenSplit:
    """Windows that start with first, first + 8, …: a row tells its source and its window."""
    ids = np.arange(first, first + windows * CONTEXT + 1)
    return TokenSplit("train", Tokens([ids]), documents=1, bytes=len(ids))


SPLITS = {name: make_split(1000 * i, windows) for i, (name, windows) in enumerate(WINDOWS.items())}


def make(
    *phases: PhaseSettings, rows: int = 0, splits: dict[str, TokenSplit] | None = None, **most: float
) -> Mixture:
    splits = splits or SPLITS
    sources = {name: SourceSettings(UNUSED, most.get(name)) for name in splits}
    return mix(MixtureSettings("m", sources, phases), splits, context=CONTEXT, rows=rows)


def weights(tokens: int | None = None, **given: float) -> PhaseSettings:
    return PhaseSettings(weights=given, tokens=tokens)


def drawn(mixture: Mixture, rows: int, *, batch_size: int = 1, seed: int = 0) -> list[tuple[str, int]]:
    """(source, window) of each of the first rows."""
    names = list(WINDOWS)
    found = [
        row
        for step in range(rows // batch_size)
        for row in batch(mixture, seed=seed, step=step, batch_size=batch_size, context=CONTEXT)
    ]
    assert all((np.diff(row) == 1).all() for row in found)
    return [(names[int(row[0]) // 1000], int(row[0]) % 1000 // CONTEXT) for row in found]


# ---- whose turn it is --------------------------------------------------------------------------------------


def test_turns_are_spread_as_evenly_as_they_can() -> None:
    order = drawn(make(weights(web=0.5, books=0.25, code=0.25)), 12)
    assert "".join(name[0] for name, _ in order) == "cwbwcwbwcwbw"


@pytest.mark.parametrize(
    "given",
    [
        {"web": 0.4, "books": 0.4, "code": 0.2},
        {"web": 0.857, "books": 0.143},
        {"web": 0.98, "books": 0.013, "code": 0.007},
    ],
)
def test_after_any_number_of_rows_each_source_has_its_share(given: dict[str, float]) -> None:
    mixture, rows = make(weights(**given)), 3000
    index = np.arange(rows)
    mine = {name: np.zeros(rows, np.int64) for name in given}
    for share in mixture.shares(index):
        name = next(key for key in given if SPLITS[key] is share.split)
        mine[name][share.rows] = 1
        assert share.draws.tolist() == list(range(len(share.draws)))  # no turn is left out, none comes twice
    assert (sum(mine.values()) == 1).all()
    for name, weight in given.items():
        error = np.abs(np.cumsum(mine[name]) - (index + 1) * weight)
        assert error.max() < len(given)
        assert mixture.counts(rows)[name] == mine[name].sum()


def test_any_rows_in_any_order_are_the_rows_of_the_whole() -> None:
    mixture, settings = (
        make(weights(200, web=0.6, code=0.4), weights(books=1.0)),
        {"seed": 1, "batch_size": 12, "context": CONTEXT},
    )
    whole = [batch(mixture, step=step, **settings) for step in range(6)]
    for step in (4, 0, 5, 2):
        shares = [
            batch(mixture, step=step, start=start, stop=stop, **settings)
            for start, stop in ((0, 3), (3, 6), (6, 6), (6, None))
        ]
        assert (np.concatenate(shares) == whole[step]).all()
    assert drawn(mixture, 72, batch_size=12) == drawn(mixture, 72)
    assert drawn(mixture, 72, seed=1) != drawn(mixture, 72)


def test_rounding_of_thirds_is_exact_far_out() -> None:
    """Floats would be wrong here: 0.1 × 10**15 rows is not a whole number of them, and a sum of 10**15 steps
    drifts."""
    mixture = make(weights(web=0.7000000001, books=0.2, code=0.0999999999))
    start = 10**15
    assert mixture.counts(start) == {"web": 7 * 10**14 + 10**5, "books": 2 * 10**14, "code": 10**14 - 10**5}
    first = {id(share.split): int(share.draws[0]) for share in mixture.shares(start + np.arange(10))}
    assert first == {id(SPLITS[name]): count for name, count in mixture.counts(start).items()}


# ---- passes and phases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 31])
def test_every_window_comes_once_per_pass_before_any_comes_again(batch_size: int) -> None:
    mixture = make(PhaseSettings(passes={"web": 2, "books": 3, "code": 0.43}))
    order = drawn(mixture, 80 + 45 + 3, batch_size=batch_size)[: 128 - 128 % batch_size]
    for name, windows in WINDOWS.items():
        mine = [window for source, window in order if source == name]
        passes = [mine[i : i + windows] for i in range(0, len(mine), windows)]
        assert all(sorted(each) == list(range(windows)) for each in passes if len(each) == windows)
        assert all(len(set(each)) == len(each) for each in passes)
        assert len(set(map(tuple, passes))) == len(passes)  # each pass in its own order
    if batch_size == 1:
        assert Counter(name for name, _ in order) == {"web": 80, "books": 45, "code": 3}
        with pytest.raises(UserError, match="its phases end after 1,024 tokens, and the run reads 1,032"):
            drawn(mixture, 129)


def test_phases_follow_each_other_and_a_source_goes_on_where_it_was() -> None:
    mixture = make(
        weights(80, web=1.0),
        weights(80, books=0.5, web=0.5),
        PhaseSettings(passes={"code": 1, "web": 0.5}),
        weights(books=1.0),
    )
    order = drawn(mixture, 60)
    parts = [order[:10], order[10:20], order[20:47], order[47:]]
    assert [dict(Counter(name for name, _ in part)) for part in parts] == [
        {"web": 10},
        {"web": 5, "books": 5},
        {"web": 20, "code": 7},
        {"books": 13},
    ]
    web = [window for name, window in order if name == "web"]
    assert len(web) == len(set(web)) == 35  # of 40: one pass, not begun anew by a phase
    assert sorted(window for name, window in order if name == "code") == list(range(7))
    turns = [share.draws for share in mixture.shares(np.arange(60)) if share.split is SPLITS["web"]]
    assert np.concatenate(turns).tolist() == list(range(35))


def test_two_sources_of_one_text_are_read_in_different_orders() -> None:
    splits = {"a": SPLITS["web"], "b": SPLITS["web"]}
    mixture = make(PhaseSettings(passes={"a": 1, "b": 1}), splits=splits)
    orders: dict[int, list[int]] = {}
    for i in range(80):
        [share] = mixture.shares(np.array([i]))
        orders.setdefault(share.key, []).append(
            int(batch(mixture, seed=0, step=i, batch_size=1, context=CONTEXT)[0, 0])
        )
    first, second = orders.values()
    assert sorted(first) == sorted(second)
    assert first != second


# ---- 10**12 tokens -----------------------------------------------------------------------------------------


class Counting:
    """10**12 tokens that are nowhere: token i is i."""

    dtype = np.dtype(np.int64)

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice) -> np.ndarray:
        return np.arange(where.start, where.stop)


def test_a_batch_of_a_trillion_tokens_costs_what_a_batch_costs() -> None:
    context, batch_size = 2048, 256
    sizes = {"web": 10**12, "code": 3 * 10**11, "books": 10**9}
    splits = {name: TokenSplit("train", Counting(size), 1, size) for name, size in sizes.items()}  # type: ignore[arg-type]
    sources = {name: SourceSettings(UNUSED) for name in sizes}
    settings = MixtureSettings(
        "m",
        sources,
        (PhaseSettings(weights={"web": 0.7, "code": 0.2, "books": 0.1}, tokens=10**12), weights(web=1)),
    )
    mixture = mix(settings, splits, context=context, rows=2 * 10**12 // context)
    tracemalloc.start()
    seconds = []
    for step in (0, 10**6, 1_907_347, 3_000_000):  # the third holds the boundary of the phases
        start = time.perf_counter()
        rows = batch(mixture, seed=0, step=step, batch_size=batch_size, context=context)
        seconds.append(time.perf_counter() - start)
        assert rows.shape == (batch_size, context + 1)
        assert len(set(rows[:, 0].tolist())) >= batch_size - 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * rows.nbytes
    assert min(seconds) < 0.5  # some 10 ms; a permutation of 10**9 windows would take minutes


def test_windows_of_a_large_source_are_drawn_evenly_and_differently() -> None:
    splits = {
        "web": TokenSplit("train", Counting(8 * 10**11 + 1), 1, 1),
        "code": TokenSplit("train", Counting(8 * 10**6 + 1), 1, 1),
    }  # type: ignore[arg-type]
    mixture = make(weights(web=0.5, code=0.5), splits=splits)
    rows = batch(mixture, seed=0, step=3, batch_size=40_000, context=CONTEXT)
    web = np.concatenate(
        [
            rows[share.rows, 0]
            for share in mixture.shares(np.arange(120_000, 160_000))
            if share.split is splits["web"]
        ]
    )
    assert len(np.unique(web)) == len(web) == 20_000
    counts = np.histogram(web, bins=10, range=(0, 8 * 10**11))[0]
    assert (np.abs(counts - 2000) < 5 * np.sqrt(2000)).all()


# ---- faults ------------------------------------------------------------------------------------------------


def faults(*phases: PhaseSettings, tokenizer: str | None = None, **most: Any) -> list[str]:
    sources = {
        name: SourceSettings(dataclasses.replace(UNUSED, tokenizer=tokenizer), most.get(name))
        for name in WINDOWS
    }
    return mixture_disagreements(MixtureSettings("m", sources, phases), UNUSED)


ALL = {"web": 0.5, "books": 0.3, "code": 0.2}


@pytest.mark.parametrize(
    ("phases", "fault"),
    [
        ([], "mixture.phases: none"),
        ([PhaseSettings()], r"mixture.phases\[0\]: give either weights or passes"),
        ([PhaseSettings(weights=ALL, passes=ALL)], "give either weights or passes"),
        (
            [weights(web=0.5, books=0.3, code=0.1)],
            r"mixture.phases\[0\].weights: must sum to 1; 0.5 \+ 0.3 \+ 0.1 = 0.9",
        ),
        (
            [weights(web=0.5, books=0.3, cod=0.2), weights(**ALL)],
            r"weights: unknown source 'cod'; did you mean 'code'\?",
        ),
        ([weights(web=1.2, books=-0.2, code=0.0)], "weights.books: must be positive; found -0.2"),
        ([weights(0, **ALL)], "tokens: must be positive"),
        ([PhaseSettings(passes=ALL, tokens=5)], "passes say how long the phase is"),
        (
            [weights(**ALL), weights(**ALL)],
            r"mixture.phases\[0\].tokens: missing, and no share; only the last phase",
        ),
        (
            [PhaseSettings(weights=ALL, share=1.2)],
            r"mixture.phases\[0\].share: with weights and without tokens, .* found 1.2",
        ),
        ([PhaseSettings(weights=ALL, share=0.5, tokens=5)], "share: with weights and without tokens"),
        ([PhaseSettings(passes=ALL, share=0.5)], "share: with weights and without tokens"),
        (
            [PhaseSettings(weights=ALL, share=0.6)] * 2,
            "mixture.phases: their shares are 1.2 of the run together; at most 1",
        ),
        (
            [weights(web=0.5, books=0.5)],
            "mixture.sources.code: in no phase; give it a weight, or leave it out",
        ),
    ],
)
def test_what_a_mixture_cannot_be(phases: list[PhaseSettings], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        UserError.collect(faults(*phases))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [10, 50, 1000, 999])
def test_phases_in_shares_of_the_run_fit_any_budget(rows: int) -> None:
    mixture = make(
        PhaseSettings(weights={"web": 0.5, "books": 0.5}, share=0.94),
        PhaseSettings(weights={"code": 1.0}),
        rows=rows,
    )
    last = rows - round(Fraction(94, 100) * rows)
    assert mixture.counts(rows)["code"] == last
    names = [name for name, _ in drawn(mixture, rows)]
    assert names[-last:] == ["code"] * last
    assert "code" not in names[:-last]
    exact = make(
        PhaseSettings(weights={"web": 1.0}, share=0.3),
        PhaseSettings(weights={"books": 0.5, "code": 0.5}, share=0.7),
        rows=rows,
    )
    assert sum(exact.counts(rows).values()) == rows


def test_a_mixture_that_holds_has_no_faults() -> None:
    assert faults(weights(100, **ALL), PhaseSettings(passes={"web": 1, "books": 2.5})) == []
    assert "max_passes: must be positive" in faults(weights(**ALL), web=0)[0]
    assert (
        "a model reads with one only; set data.tokenizer=other"
        in faults(weights(**ALL), tokenizer="other")[0]
    )


def test_a_source_that_ends_early_is_told_before_the_run() -> None:
    make(weights(**ALL), rows=70, code=2)
    with pytest.raises(
        UserError,
        match=(
            r"mixture.sources.code: it ends early: the run asks for 128 of its tokens, and it has 56 × "
            r"max_passes=2;"
        ),
    ):
        make(weights(**ALL), rows=75, code=2)
    with pytest.raises(UserError, match="its phases end after 80 tokens, and the run reads 88; lower"):
        make(weights(80, **ALL), rows=11)
    with pytest.raises(
        UserError, match=r"mixture.sources.b: its training part has 8 tokens, less than one window of 8 \+ 1"
    ):
        make(
            weights(a=0.5, b=0.5),
            splits={"a": SPLITS["web"], "b": TokenSplit("train", Tokens([np.arange(8)]), 1, 8)},
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "fault"),
    [
        (
            "+mixture.sources.stdlib.max_pases=3",
            "mixture.sources.stdlib.max_pases: unknown key; did you mean 'max_passes'?",
        ),
        (
            "+mixture.sources.stdlib.max_passes=often",
            "mixture.sources.stdlib.max_passes: expected a number; found 'often'",
        ),
        (
            "mixture.sources.textbooks.data.corpus=textbook",
            "mixture.sources.textbooks.data.corpus: unknown value 'textbook'",
        ),
        (
            "mixture.phases=[{weights:{stdlib:half,textbooks:0.5}}]",
            "mixture.phases[0].weights.stdlib: expected a number; found 'half'",
        ),
        (
            "mixture.phases=[{weights:{stdlib:0.6,textbooks:0.3}}]",
            "mixture.phases[0].weights: must sum to 1; 0.6 + 0.3 = 0.9",
        ),
        (
            "mixture.sources.textbooks.data.limit_documents=null",
            "mixture.sources.textbooks.data.limit_documents: missing",
        ),
        ("mixture=tiny_textbook", "unknown mixture; did you mean 'tiny_textbooks'"),
    ],
)
def test_faults_are_told_at_the_door_under_their_whole_names(override: str, fault: str) -> None:
    from outgrow.train.compose import compose

    with pytest.raises(UserError) as caught:
        compose(["growth=scratch", "target=tiny_target", "mixture=tiny_textbooks", override])
    assert fault in str(caught.value)


@pytest.mark.slow
def test_where_a_source_lies_is_no_part_of_what_a_run_is() -> None:
    from outgrow.train.compose import compose
    from outgrow.train.settings import settings_hash

    def hash_of(*more: str) -> str:
        return settings_hash(
            compose(["growth=scratch", "target=tiny_target", "mixture=tiny_textbooks", *more])
        )

    assert hash_of("mixture.sources.textbooks.data.folder=elsewhere") == hash_of()
    assert hash_of("mixture.sources.textbooks.data.seed=1") != hash_of()
    assert hash_of("mixture.phases=[{weights:{stdlib:0.5,textbooks:0.5}}]") != hash_of()


@pytest.mark.slow
def test_runs_that_were_begun_before_there_were_shares_go_on() -> None:
    from outgrow.train.compose import compose
    from outgrow.train.settings import identity

    settings = compose(["growth=scratch", "target=tiny_target", "mixture=tiny_textbooks"])
    assert {"share", "data_dir"}.isdisjoint(
        key for phase in identity(settings)["mixture.phases"] for key in phase
    )
    assert not any(key.endswith("data_dir") for key in identity(settings))
    assert (
        identity(compose(["growth=scratch", "target=tiny_target", "data=the_stack"]))["data.data_dir"]
        == "data/python"
    )


@pytest.mark.slow
def test_phases_of_a_share_leave_horizons_no_trunk_to_share() -> None:
    from outgrow.train.compose import compose
    from outgrow.train.run.horizons import branch_step

    mixture = ["data=the_stack", "mixture=phi_1", "data.tokenizer=microsoft/phi-1_5"]
    settings = compose(["experiment=when_growth_pays", "growth=scratch", *mixture])
    assert settings.schedule.horizons
    assert branch_step(settings) is None


# ---- from folders ------------------------------------------------------------------------------------------


def test_sources_are_cut_by_the_tokenizer_of_the_data_and_only_their_training_parts_are_read(
    tmp_path: Path,
) -> None:
    def text(name: str, word: str) -> DataSettings:
        (tmp_path / name).mkdir()
        for i in range(12):
            (tmp_path / name / f"{i}.txt").write_text(f"{word}{i} " * 60)
        return DataSettings(name=name, corpus="files", path=str(tmp_path / name), folder=str(tmp_path / f"{name}-tokens"), vocab_size=270,
                            validation_fraction=0.3)  # fmt: skip

    own, other = text("own", "alpha"), text("other", "omega")
    data = prepare(own, progress=False)
    settings = MixtureSettings(
        "m", {"mine": SourceSettings(own), "more": SourceSettings(other)}, (weights(mine=0.5, more=0.5),)
    )
    quietly = partial(prepare, progress=False)
    both = mixed(settings, own, data, quietly, context=16, rows=50)
    assert isinstance(both.train, Mixture)
    assert both.train.splits["mine"].count == data.train.count
    assert (both.validation, both.vocab_size) == (data.validation, data.vocab_size)
    assert both.fingerprint != data.fingerprint
    assert sorted(
        path.name[:10] for path in tmp_path.iterdir() if path.is_dir() and "tokens" in path.name
    ) == ["other-toke", "own-tokens"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_folder)
    lines = [tokenizer.decode(row) for row in batch(both.train, seed=0, step=0, batch_size=8, context=16)]
    assert sum("omega" in line for line in lines) == sum("alpha" in line for line in lines) == 4
    assert mixed(None, own, data, quietly, context=16, rows=50) is data
    assert mixed(settings, own, data, quietly, context=16, rows=50).fingerprint == both.fingerprint
    less = dataclasses.replace(settings, phases=(weights(mine=0.2, more=0.8),))
    assert mixed(less, own, data, quietly, context=16, rows=50).fingerprint != both.fingerprint


FILES = DataSettings("own", "files", path="texts")
STDLIB = DataSettings("own", "stdlib")


@pytest.mark.parametrize(
    ("own", "change", "fault"),
    [
        (FILES, {"seed": 1}, "seed: 1, and data=own"),
        (FILES, {"validation_fraction": 0.02}, "validation_fraction: 0.02, and data=own"),
        (FILES, {"path": "texts/python/*.py", "validation_fraction": 0.02}, "validation_fraction: 0.02"),
        (
            FILES,
            {"path": ".", "validation_fraction": 0.02},
            "which may have texts in common with it, has 0.05",
        ),
        (FILES, {"clean": CleaningSettings(normalise=True)}, "clean.normalise: True"),
        (STDLIB, {"corpus": "packages", "validation_fraction": 0.02}, "validation_fraction: 0.02"),
        (DataSettings("own", "exercises"), {"validation_fraction": 0.02}, "validation_fraction: 0.02"),
        (DataSettings("own", "hub", dataset="a/b"), {"config": "c", "seed": 1}, "seed: 1"),
        (
            DataSettings("own", "tokens", path="a", validation_path="a/v.bin"),
            {"validation_path": None},
            "None",
        ),
        (FILES, {"validation_fraction": 0.1}, None),
        (FILES, {"path": "text", "validation_fraction": 0.02}, None),
        (FILES, {"path": "texts2/*", "validation_fraction": 0.02}, None),
        (FILES, {"corpus": "stdlib", "validation_fraction": 0.02}, None),
        (DataSettings("own", "hub", dataset="a/b"), {"dataset": "a/c", "seed": 1}, None),
    ],
)
def test_what_is_held_out_is_not_trained_on(
    own: DataSettings, change: dict[str, Any], fault: str | None
) -> None:
    source = SourceSettings(dataclasses.replace(own, name="more", limit_documents=9, **change))
    lines = mixture_disagreements(MixtureSettings("m", {"more": source}, (weights(more=1.0),)), own)
    found = [line for line in lines if "held out" in line]
    assert len(found) == (fault is not None)
    assert not fault or (found[0].startswith("mixture.sources.more.data.") and fault in found[0])


def test_a_hash_holds_out_less_where_the_share_is_smaller() -> None:
    """Where no fault is told: each text that the larger share trains on is trained on in the smaller, too."""
    digests = [digest_of(f"text {i}".encode()) for i in range(400)]
    small, large = (dataclasses.replace(FILES, validation_fraction=share) for share in (0.05, 0.3))
    sides = [(held_out(digest, small), held_out(digest, large)) for digest in digests]
    assert set(sides) == {(False, False), (False, True), (True, True)}


def test_weights_are_the_numbers_as_written() -> None:
    [phase] = make(weights(web=0.857, books=0.143)).phases
    assert dict(phase.weights) == {"web": Fraction(857, 1000), "books": Fraction(143, 1000)}


@pytest.mark.slow
def test_a_run_trains_on_the_mixture_and_refuses_to_go_on_with_another(tmp_path: Path) -> None:
    from outgrow.train.compose import compose
    from outgrow.train.loop import train

    for name, word in (("own", "alpha"), ("more", "omega")):
        (tmp_path / name).mkdir()
        for i in range(12):
            (tmp_path / name / f"{i}.txt").write_text(f"{word}{i} " * 60)
    sizes = (
        "hidden_size:16,intermediate_size:32,num_hidden_layers:1,num_attention_heads:2,num_key_value_heads:2"
    )
    target = f"target={{model_type:phi,vocab_size:300,max_position_embeddings:32,tie_word_embeddings:false,{sizes}}}"
    small = ["context=16", "batch_tokens=64", "budget_tokens=256", "eval_tokens=64", "save_every_tokens=128"]
    given = [
        "data=files",
        f"data.path={tmp_path / 'own'}",
        f"data.folder={tmp_path / 'tokens'}",
        "data.vocab_size=270",
    ]
    given += [
        "data.validation_fraction=0.3",
        "growth=scratch",
        target,
        "logger=none",
        "progress=false",
        *(f"train.{x}" for x in small),
    ]
    settings = dataclasses.replace(compose(given), out=str(tmp_path / "run"))
    more = dataclasses.replace(
        settings.data, name="more", path=str(tmp_path / "more"), folder=str(tmp_path / "more-tokens")
    )
    sources = {"own": SourceSettings(settings.data), "more": SourceSettings(more, max_passes=5)}
    settings = dataclasses.replace(
        settings, mixture=MixtureSettings("m", sources, (weights(own=0.5, more=0.5),))
    )
    folder = train(settings)
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["mixture"]["phases"] == [
        {"weights": {"own": 0.5, "more": 0.5}, "passes": None, "tokens": None, "share": None}
    ]
    assert run["data"]["tokens_read"] == {"own": 128, "more": 128}
    (folder / "summary.json").unlink()
    (tmp_path / "more" / "13.txt").write_text("omega " * 100)
    with pytest.raises(UserError, match="the data has changed since this run began"):
        train(settings)


# ---- the presets -------------------------------------------------------------------------------------------

SYNTHETIC, NATURAL, CODE, PHI_1 = {"synthetic"}, {"web"}, {"code"}, {"code", "textbooks", "exercises"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("phi_1_5", [(PHI_1, 0.2), (SYNTHETIC, 0.8)]),
        ("phi_1_5_web", [(NATURAL, 0.4), (PHI_1, 0.2), (SYNTHETIC, 0.4)]),
        ("phi_1_5_web_only", [(NATURAL, 0.8), (CODE, 0.2)]),
        ("phi_2", [(NATURAL, 0.4), (PHI_1, 0.2), (SYNTHETIC, 0.4)]),
    ],
)
def test_presets_mix_as_their_papers_say(name: str, shares: list[tuple[set[str], float]]) -> None:
    from outgrow.train.compose import compose

    mixture = compose(["growth=scratch", "target=tiny_target", "data=fineweb_edu", f"mixture={name}"]).mixture
    assert mixture is not None
    [phase] = mixture.phases
    assert phase.weights is not None
    for sources, share in shares:
        assert sum(phase.weights.get(source, 0) for source in sources) == pytest.approx(share, abs=1e-12)
    splits = {source: TokenSplit("train", Counting(10**9), 1, 1) for source in mixture.sources}  # type: ignore[arg-type]
    rows = 50_000
    counts = mix(mixture, splits, context=2048, rows=rows).counts(rows)
    for sources, share in shares:
        assert abs(sum(counts.get(source, 0) for source in sources) - share * rows) < len(mixture.sources)


@pytest.mark.slow
def test_phi_1_reads_code_with_textbooks_and_then_exercises_6_percent_of_the_run() -> None:
    from outgrow.train.compose import compose

    mixture = compose(["growth=scratch", "target=tiny_target", "data=the_stack", "mixture=phi_1"]).mixture
    assert mixture is not None
    splits = {name: make_split(0, 1000) for name in mixture.sources}
    first, second = mix(mixture, splits, context=CONTEXT, rows=1000).phases
    assert first.counts(940) == {"code": 817, "textbooks": 123}  # 6 B : under 1 B tokens
    assert (first.stop, second.start, second.stop, dict(second.weights)) == (940, 940, None, {"exercises": 1})


def test_two_sources_of_one_leaf_have_a_folder_each() -> None:
    leaf = DataSettings("t", "stdlib")
    less = replace(leaf, limit_documents=3)
    found = apart({"all": leaf, "some": less, "same": leaf})
    assert [str(source.home) for source in found.values()] == ["data/t", "data/t-some", "data/t"]
    assert found["some"] == replace(less, folder="data/t-some")


def test_passes_that_are_less_than_a_window_are_told() -> None:
    with pytest.raises(
        UserError, match=r"passes of code: 0\.001 × \d+ windows is less than one window; raise it"
    ):
        make(PhaseSettings(passes={"web": 1, "code": 0.001}))
