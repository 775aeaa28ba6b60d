"""Selection by successive halving: who goes on, what ties, what it cost, and that a second call trains nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import spearmanr

from helpers.toy import TARGET, toy_overrides
from outgrow.experiments import study
from outgrow.experiments.__main__ import main
from outgrow.experiments.halving import Candidate, Halving, question
from outgrow.experiments.selection import jobs_of, select
from outgrow.experiments.selection_report import table
from outgrow.experiments.standings import Rung, Selection, Standing, rank_correlation, ranked, ties
from outgrow.model.base.errors import Diverged, UserError
from outgrow.train.loop import train_horizons


@pytest.mark.parametrize(
    ("candidates", "keep", "rungs"),
    [
        (2, 0.5, [(1000, 1)]),
        (4, 0.5, [(1000, 2), (2000, 1)]),
        (5, 0.5, [(1000, 3), (2000, 2), (4000, 1)]),
        (9, 1 / 3, [(1000, 3), (3000, 1)]),
        (3, 0.9, [(1000, 2), (1111, 1)]),  # one is left out at least
    ],
)
def test_the_rungs(candidates: int, keep: float, rungs: list[tuple[int, int]]) -> None:
    assert Halving(1000, keep).rungs(candidates) == rungs


def standing(label: str, *losses: float, start: float = 9.0, learned: float = 0.0) -> Standing:
    count = len(losses)
    return Standing(label, (start,) * count, losses, (10.0,) * count, (learned,) * count)


def test_a_tie_goes_to_the_cheaper() -> None:
    best = standing("best", 3.00, 3.10, 3.20, learned=5.0)
    noisy = standing("noisy", 3.10, 3.00, 3.26)  # 0.02 ± 0.25 behind: a tie, and cheaper
    worse = standing("worse", 3.30, 3.41, 3.50)  # 0.3 behind with every seed
    assert ties(noisy, best)
    assert not ties(worse, best)
    assert [one.label for one in ranked([worse, best, noisy])] == ["noisy", "best", "worse"]


def test_one_seed_ties_with_equal_losses_alone() -> None:
    assert not ties(standing("a", 3.0), standing("b", 3.0001))
    cheap, dear = standing("cheap", 3.0), standing("dear", 3.0, learned=1.0)
    assert [one.label for one in ranked([dear, cheap])] == ["cheap", "dear"]


def test_the_rank_correlation_is_spearmans() -> None:
    one, other = [3.0, 1.0, 2.0, 5.0], [30.0, 10.0, 40.0, 20.0]
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation([1.0, 2.0, 3.0], [9.0, 8.0, 7.0]) == pytest.approx(-1)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_a_selection_tells_losses_costs_and_correlations() -> None:
    first = tuple(
        standing(label, loss, start=begin)
        for label, loss, begin in [("a", 1.0, 3.0), ("b", 2.0, 2.0), ("c", 3.0, 1.0)]
    )
    second = (standing("b", 0.5, start=2.0, learned=4.0), standing("a", 0.75, start=3.0))
    made = Selection("s", (Rung(100, first, 2), Rung(200, second, 1)))
    assert [one.label for one in made.last] == ["b", "a", "c"]
    assert made.ledger["flops"] == 14 + 10 + 10
    assert made.ledger["losers_flops"] == 20
    assert [row["spearman"] for row in made.correlations] == [pytest.approx(-1), None]
    assert "| **b** | 2.0000 | 2.0000 | 0.5000 | 14 | 4 |" in table(made)
    assert "| c | 1.0000 | 3.0000 |  | 10 | 0 |" in table(made)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with a study of toy runs."""
    folder = tmp_path_factory.mktemp("select")
    (folder / "text").mkdir()
    own = [
        one for one in toy_overrides(folder / "text") if not one.startswith(("study=", "target=", "growth="))
    ]
    deeper = TARGET.replace("num_hidden_layers:1", "num_hidden_layers:2")
    definition = {
        "question": "Which start?",
        "source": [*own, TARGET, "growth=scratch", "study=toy_source", "changes=''"],
        "runs": [*own, deeper, "study=toy", "source=runs/toy_source-scratch-s0/final"],
        "arms": {
            "scratch": {"learning_rate": 0.1},
            "stacked": {"growth": "lossless", "overrides": ["growth.depth=stack"]},
        },
        "demo": {"arms": ["scratch", "stacked"], "seeds": [0]},
        "full": {"arms": ["scratch", "stacked"], "seeds": [0]},
    }
    (folder / "experiments" / "toy").mkdir(parents=True)
    (folder / "experiments" / "toy" / "study.yaml").write_text(yaml.safe_dump(definition))
    return folder


@pytest.mark.slow
def test_candidates_train_alike_and_a_second_call_trains_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    trained: list[str] = []

    def in_this_process(todo: Any, *_: Any) -> None:
        for job in todo:
            trained.append(job.name)
            train_horizons(job.settings)

    monkeypatch.setattr(study, "run_jobs", in_this_process)
    words = ["scratch", "stacked", "lossless growth.noise=0.0", "lag_tokens=256"]
    assert main(["select", "toy", *words]) == 0
    record = json.loads(Path("runs/select-toy/selection.json").read_text())
    assert [rung["tokens"] for rung in record["rungs"]] == [256, 512]
    assert [len(rung["standings"]) for rung in record["rungs"]] == [3, 2]
    assert len(trained) == 1 + 3 + 2
    rates = set()
    for run in sorted(Path("runs").glob("toy-select-*-t*")):
        settings = json.loads((run / "run.json").read_text())["settings"]
        rates.add((settings["optimizer"]["learning_rate"], settings["schedule"]["warmup_tokens"]))
        assert settings["schedule"]["decay_fraction"] == 0
        summary = json.loads((run / "summary.json").read_text())
        assert summary["tokens"] == int(run.name.partition("-t")[2].rpartition("t")[2])
    assert len(rates) == 1
    ledger = json.loads(Path("runs/select-toy/ledger.json").read_text())
    winner = record["winner"]
    own = json.loads((Path("runs") / f"toy-select-{winner}-lag256-s0-t512" / "summary.json").read_text())
    assert ledger["candidates"][winner]["flops"] == own["flops"]
    assert ledger["losers_flops"] == pytest.approx(ledger["flops"] - own["flops"])
    shown = capsys.readouterr().out
    assert f"take {winner}" in shown
    assert "rank correlation, right after growth → 256 tokens" in shown

    trained.clear()
    assert main(["select", "toy", *words]) == 0
    assert not trained


@pytest.mark.slow
def test_a_candidate_that_diverges_is_out_and_the_others_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)

    def in_this_process(todo: Any, *_: Any) -> None:
        errors: dict[str, BaseException] = {}
        for job in todo:
            try:
                train_horizons(job.settings)
            except UserError as error:
                errors[job.name] = pickle.loads(pickle.dumps(error))  # as between processes
        if errors:
            raise study.RunFailed("; ".join(map(str, errors.values())), errors)

    monkeypatch.setattr(study, "run_jobs", in_this_process)
    wild = "lossless optimizer.weight_decay=1e20"
    words = ["scratch", "stacked", wild, "lag_tokens=512"]
    assert main(["select", "toy", *words]) == 0
    record = json.loads(Path("runs/select-toy/selection.json").read_text())
    first, *_ = record["rungs"]
    (out,) = first["diverged"]
    assert out["label"] == "lossless-weight_decay_1e20"
    assert "not finite" in out["reason"]
    assert {one["label"] for one in first["standings"]} == {"scratch", "stacked"}
    assert record["winner"] in ("scratch", "stacked")
    assert record["ledger"]["candidates"][out["label"]]["flops"] == out["flops"]
    shown = capsys.readouterr().out
    assert f"**{out['label']}** diverged before 512 tokens and is out" in shown
    with pytest.raises(UserError, match="every candidate diverged"):
        select(question("toy", [wild, f"{wild} growth.noise=0.0", "lag_tokens=512"]))


def test_a_run_that_fails_otherwise_stops_the_selection(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(study, "ready_sources", lambda *_: [])
    monkeypatch.setattr(study, "prepare_text", lambda *_: None)

    def fails(todo: Any, *_: Any) -> None:
        errors: list[BaseException] = [Diverged("NaN"), OSError("the disk is full")]
        named = zip((job.name for job in todo), errors, strict=False)
        raise study.RunFailed("two failed", dict(named))

    monkeypatch.setattr(study, "run_jobs", fails)
    with pytest.raises(study.RunFailed, match="two failed"):
        select(question("toy", ["scratch", "stacked", "lag_tokens=384"]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lossless", "stacked"], "lag_tokens: missing"),
        (["lossless", "lag_tokens=256"], "candidates: 1; give two or more"),
        (["lossles", "stacked", "lag_tokens=256"], "unknown candidate 'lossles'; did you mean 'lossless'"),
        (["source", "stacked", "lag_tokens=256"], "unknown candidate 'source'"),
        (["stacked", "stacked", "lag_tokens=256"], "candidate stacked: named twice"),
        (["lossless", "stacked", "lag_tokens=-1"], "lag_tokens: must be positive"),
        (["lossless", "stacked", "lag_tokens=256", "keep=1"], "keep: a share between 0 and 1"),
        (["lossless", "stacked", "lag_tokens=256", "seeds=[0,0]"], "seeds: at least one, each once"),
        (["lossless", "stacked", "lag_tokens=many"], "lag_tokens: expected"),
    ],
    ids=str,
)
def test_what_cannot_be_selected_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=told.replace("[", r"\[")):
        question("toy", words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["schedule.warmup_tokens=256"], "lag_tokens: 256 is within the warm-up of 256 tokens"),
        (["lag_token=256"], "lag_token"),
        (["train.contxt=8"], "did you mean"),
    ],
    ids=str,
)
def test_runs_that_cannot_be_are_told_with_the_candidate(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(place)
    asked = question("toy", ["stacked", "lossless growth.depth=interleave", "lag_tokens=256", *words])
    assert asked.candidates[1] == Candidate("lossless", ("growth.depth=interleave",))
    assert asked.candidates[1].label == "lossless-depth_interleave"
    with pytest.raises(UserError, match=told):
        jobs_of(asked, asked.candidates[0], [256])
