"""Arms that differ in training alone, or in the scale of what is fresh, are found and held against each
other seed by seed; what they pay is what their trainer counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import fabricate
from outgrow.experiments.changes import Change, summary
from outgrow.experiments.compare import answer, compare
from outgrow.experiments.cost import half_interval
from outgrow.experiments.report import html
from outgrow.experiments.table import CHANGE_HEADER, HEADER, as_json, cells, change_cells, markdown
from outgrow.model.geometry import flops_per_token
from outgrow.train import loop
from outgrow.train.compose import compose

PLAIN: dict[str, Any] = {
    "name": "plain",
    "optimizer": None,
    "inherited_rate": 1.0,
    "mup": False,
    "teacher": None,
}
TEACHER = {"model": "source", "weight": [0.5, 0.0], "until": 0.5}
CURVE = [8.0, 6.0, 5.0]


def arm(
    tmp: Path,
    name: str,
    ends: list[float],
    operator: str,
    *,
    rate: float = 1e-3,
    stages: Any = (),
    **changes: Any,
) -> list[Path]:
    """One run for each final loss, seeds from 0. `changes` are entries of its transfer settings, a
    schedule's `rewarm`, and the scale of `fresh` entries."""
    schedule = {"rewarm": changes.pop("rewarm", "full")}
    spans = {"spans": changes.pop("spans")} if "spans" in changes else {}
    growth: dict[str, Any] = {"name": name, "operator": operator, "stages": list(stages)}
    if "fresh" in changes:
        growth["options"] = {"depth": "identity", "fresh": changes.pop("fresh")}
    settings = {
        "settings.growth": growth,
        "settings.transfer": PLAIN | changes,
        "settings.schedule": schedule,
    }
    return [
        fabricate(tmp, name, [*CURVE, end], seed=seed, rate=rate, **settings, **spans)
        for seed, end in enumerate(ends)
    ]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        *arm(tmp_path, "scratch", [4.0, 4.2], "scratch"),
        *arm(tmp_path, "lossless", [3.0, 3.1, 3.2], "lossless"),
        *arm(tmp_path, "lossless", [3.5], "lossless", rate=2e-3),  # a worse rate is no rival
        *arm(tmp_path, "tile", [3.0], "tile"),  # another start
        *arm(tmp_path, "continued", [2.9, 3.0, 3.1], "lossless", optimizer="source", rate=2e-3),
        *arm(tmp_path, "taught", [3.2, 2.9], "lossless", teacher=TEACHER, spans=[{"last": 4, "flops_per_token": 12.5},
                                                                               {"last": 6, "flops_per_token": 10.0}]),
        *arm(tmp_path, "warm", [3.05], "lossless", rewarm="new", inherited_rate=0.5),
        *arm(tmp_path, "stacked", [4.5, 4.8], "scratch", stages=[{"until": 0.5}, {"until": 1.0}], spans=[
            {"last": 4, "flops_per_token": 4.0}, {"last": 6, "flops_per_token": 10.0}]),
    ]  # fmt: skip


def test_each_arm_is_held_against_the_plain_one_of_its_start(folders: list[Path]) -> None:
    found = compare(folders).changes
    assert [(change.plain, change.arm, change.settings, change.seeds) for change in found] == [
        ("lossless", "continued", ("transfer.optimizer",), (0, 1, 2)),
        ("lossless", "taught", ("transfer.teacher",), (0, 1)),
        ("lossless", "warm", ("schedule.rewarm", "transfer.inherited_rate"), (0,)),
        ("scratch", "stacked", ("growth.stages",), (0, 1)),
    ]
    assert [change.difference for change in found] == pytest.approx([-0.1, 0.0, 0.05, 0.55])
    assert [change.flops for change in found] == pytest.approx(
        [1.0, (200 * 12.5 + 1000) / 3000, 1.0, (800 + 1000) / 3000]
    )
    assert [change.interval for change in found[:3]] == [
        pytest.approx(0, abs=1e-9),
        pytest.approx(half_interval([0.2, -0.2])),
        None,
    ]
    words = ["lower", "no change that the seeds can tell", "no change that the seeds can tell", "higher"]
    # 0.5 and 0.6 from two seeds
    assert [change.verdict for change in found] == [*words[:3], "no change that the seeds can tell"]
    assert Change("a", "b", (), (0, 1, 2), 1.0, 0.5, 0.1).verdict == words[3]


def test_a_start_is_held_against_itself_with_another_scale_of_what_is_fresh(tmp_path: Path) -> None:
    runs = [
        *arm(tmp_path, "scratch", [4.0], "scratch"),
        *arm(tmp_path, "random_pad", [3.0, 3.1, 3.2], "random_pad", fresh="init"),
        *arm(tmp_path, "random_pad_match", [3.2, 3.2, 3.5], "random_pad", fresh="match"),
        *arm(tmp_path, "tile_match", [3.0], "tile", fresh="match"),  # nothing starts as it does
    ]
    (change,) = compare(runs).changes
    assert (change.plain, change.arm, change.settings) == (
        "random_pad",
        "random_pad_match",
        ("growth.options.fresh",),
    )
    assert (change.seeds, change.difference) == ((0, 1, 2), pytest.approx(0.2))


def test_the_table_the_page_and_the_json_have_the_changes(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare(folders)
    table = markdown(comparison)
    (tmp_path / "picture.png").write_bytes(b"")
    page = html(comparison, tmp_path / "picture.png")
    assert "Against the arm that starts alike and is trained on plainly" in table
    for change in comparison.changes:
        assert "| " + " | ".join(change_cells(change)) + " |" in table
        assert "".join(f"<td>{cell}</td>" for cell in change_cells(change)) in page
    shown = dict(zip(CHANGE_HEADER, change_cells(comparison.changes[1]), strict=True))
    assert (shown["differs in"], shown["FLOPs of training"], shown["n"]) == (
        "transfer.teacher",
        "1.17 ×",
        "2",
    )
    assert as_json(comparison)["changes"][0]["verdict"] == "lower"
    json.dumps(as_json(comparison))
    assert not compare(
        [folder for folder in folders if "scratch" in folder.name or "tile" in folder.name]
    ).changes


def test_what_the_changes_did_is_said_in_a_sentence_each(folders: list[Path]) -> None:
    untold = "no change that the seeds can tell"
    said = (
        f"Final loss against lossless, lower for continued; {untold} for taught, warm. Final loss against "
        f"scratch, {untold} for stacked"
    )
    comparison = compare(folders)
    assert summary(comparison.changes) == said
    assert f"**{said}.**" in markdown(comparison)


def test_a_saving_that_not_every_seed_has_is_called_so(tmp_path: Path) -> None:
    folders = [*arm(tmp_path, "scratch", [4.0, 4.2], "scratch"), *arm(tmp_path, "tile", [3.6, 4.3], "tile")]
    assert answer(compare(folders)).startswith(
        "tile reaches scratch's final loss in the mean, though not in every seed, with 5 % fewer"
    )
    again = [
        *arm(tmp_path / "more", "scratch", [4.0, 4.2], "scratch"),
        *arm(tmp_path / "more", "tile", [3.6, 4.1], "tile"),
    ]
    assert answer(compare(again)).startswith("tile reaches scratch's final loss with")
    assert answer(compare(again)).endswith("; 2 seeds: not decided")


def test_an_arm_that_paid_less_in_all_says_where_it_ended(folders: list[Path]) -> None:
    """It paid 1,800 of scratch's 3,000 FLOPs, so there is no loss at equal FLOPs, and its end is 0.55 above
    scratch's."""
    stacked = next(row for row in compare(folders).best_rows if row.arm == "stacked")
    shown = dict(zip(HEADER, cells(stacked), strict=True))
    assert (
        shown["source excluded: S, saving"]
        == shown["source included: S, saving"]
        == "not reached, ends +0.550"
    )
    assert shown["Δ loss at equal FLOPs (excl. / incl.)"] == "– / –"


def test_an_arm_without_a_source_has_none_to_pay_for(tmp_path: Path) -> None:
    spans = [{"last": 4, "flops_per_token": 4.0}, {"last": 6, "flops_per_token": 10.0}]
    folders = arm(tmp_path, "scratch", [4.0], "scratch") + arm(
        tmp_path, "stacked", [4.0], "scratch", stages=[{}], spans=spans
    )
    assert answer(compare(folders)) == (
        "stacked reaches scratch's final loss with 40 % fewer FLOPs (it has no source to pay for); one seed: "
        "not decided"
    )


@pytest.mark.slow
def test_what_the_trainer_counted_is_what_the_comparison_reads(overrides: list[str], tmp_path: Path) -> None:
    """Six steps of real toy runs: taught for three of them by the source; frozen under a new layer; stacked
    after two."""
    source = (
        loop.train(compose([*overrides, "train.keep_optimizer=true", f"out={tmp_path / 'source'}"])) / "final"
    )
    toy = [override for override in overrides if not override.startswith("target=")]
    deeper = [f"source={source}", "target={num_hidden_layers:2}"]
    stages = "growth.stages=[{until:0.34,layers:0.5},{until:1.0,depth:stack,noise:0.0}]"
    arms = {
        "scratch": ["growth=scratch"],
        "lossless": ["growth=llama_pro"],
        "continued": ["growth=llama_pro", "transfer=continued"],
        "distilled": ["growth=llama_pro", "transfer=distilled"],
        "frozen": ["growth=llama_pro", "transfer=frozen"],
        "g_stack": ["growth=g_stack", stages],
    }
    folders = [
        loop.train(compose([*toy, *deeper, *given, f"growth.name={name}", f"out={tmp_path / name}"]))
        for name, given in arms.items()
    ]
    comparison = compare(folders)
    config = json.loads((folders[0] / "final" / "config.json").read_text())
    large, small = (flops_per_token(config | {"num_hidden_layers": layers}, 16) for layers in (2, 1))
    head = 2 * config["vocab_size"] * config["hidden_size"]
    expected = {
        **dict.fromkeys(("scratch", "lossless", "continued"), 6 * large),
        "distilled": 6 * large + 3 * small / 3,
        "frozen": 6 * (large / 3 + 2 * (large - small) / 3 + head),
        "g_stack": 2 * small + 4 * large,
    }
    assert {row.arm: row.flops for row in comparison.rows} == {
        name: pytest.approx(128 * paid) for name, paid in expected.items()
    }
    cost = 768 * small
    assert {row.arm: row.source_flops for row in comparison.rows} == {
        name: 0.0 if name in ("scratch", "g_stack") else pytest.approx(cost) for name in expected
    }
    assert [(change.plain, change.arm, change.settings) for change in comparison.changes] == [
        ("lossless", "continued", ("transfer.optimizer",)),
        ("lossless", "distilled", ("transfer.teacher",)),
        ("lossless", "frozen", ("transfer.inherited_rate",)),
        ("scratch", "g_stack", ("growth.stages",)),
    ]
    assert [change.flops for change in comparison.changes] == pytest.approx(
        [1.0, *(expected[name] / (6 * large) for name in ("distilled", "frozen", "g_stack"))]
    )
