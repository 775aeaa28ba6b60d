"""The frontier of flat models, on points drawn from a law with known constants."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from outgrow.experiments.__main__ import main
from outgrow.experiments.ends import End, write_ends
from outgrow.experiments.frontier import (
    Law,
    best_sizes,
    bootstrap,
    fit,
    flat_points,
    residuals,
    worth_of_arms,
)
from outgrow.experiments.grown_run import Growth
from outgrow.model.base.errors import UserError
from outgrow.train.compose import compose
from outgrow.train.machine.forecast import tell

TRUE = Law(math.log(1.2), math.log(60.0), math.log(150.0), 0.4, 0.35)
SIZES = (20_000, 60_000, 180_000, 540_000)
TOKENS = (1_000_000, 4_000_000, 16_000_000, 64_000_000)


def end(size: int, tokens: int, loss: float, **more: object) -> End:
    name = f"scratch-{size}-{tokens}"
    flops = 6.5 * size * tokens
    own = End(name, "scratch", "muon", 1e-2, 4096, 0, size, tokens, flops, 0.0, loss, 1, "cpu", "text")
    return dataclasses.replace(own, **more)  # type: ignore[arg-type]


def drawn(noise: float = 0.0, tokens: tuple[int, ...] = TOKENS, sizes: tuple[int, ...] = SIZES) -> list[End]:
    numbers = np.random.default_rng(1)
    pairs = [(size, count) for size in sizes for count in tokens]
    return [end(*pair, TRUE.loss(*pair) * math.exp(noise * numbers.standard_normal())) for pair in pairs]


def test_the_law_is_found_again() -> None:
    points = flat_points(drawn())
    law = fit(points)
    assert (law.alpha, law.beta) == pytest.approx((TRUE.alpha, TRUE.beta), abs=0.02)
    assert math.exp(law.log_e) == pytest.approx(1.2, abs=0.05)
    assert max(map(abs, residuals(points, law))) < 1e-3


def at_equal_flops(*budgets: float) -> list[End]:
    pairs = [(size, round(flops / 6.5 / size)) for size in SIZES for flops in budgets]
    return [end(*pair, TRUE.loss(*pair)) for pair in pairs]


def test_the_best_size_is_the_one_that_ends_lowest() -> None:
    best = best_sizes(flat_points(at_equal_flops(1e12, 8e12)))
    rounded = {float(f"{one.flops:.3g}"): one for one in best}
    assert len(best) == 2  # the budgets of the sizes differ by a token
    for flops, one in rounded.items():
        losses = {size: TRUE.loss(size, flops / 6.5 / size) for size in SIZES}
        assert one.parameters == min(losses, key=losses.__getitem__)
        assert one.val_loss == pytest.approx(min(losses.values()), abs=1e-5)
        assert not one.at_edge
    assert (rounded[1e12].parameters, rounded[8e12].parameters) == (60_000, 180_000)
    edge = best_sizes(flat_points(at_equal_flops(1e10, 2e10)))
    assert all(one.at_edge and one.parameters == SIZES[0] for one in edge)


def test_the_best_rate_of_a_size_counts_and_grown_runs_are_no_flat_models() -> None:
    ends = drawn()
    worse = [dataclasses.replace(e, val_loss=e.val_loss + 1, learning_rate=5e-3) for e in ends]
    grown = [dataclasses.replace(e, val_loss=0.1, growth=Growth(10)) for e in ends]
    fed = [dataclasses.replace(e, val_loss=0.1, source_flops=1.0) for e in ends]
    assert flat_points([*worse, *ends, *grown, *fed]) == flat_points(ends)


@pytest.mark.slow
def test_an_arms_speed_up_has_an_interval_that_holds_the_truth() -> None:
    ends = drawn(noise=0.002)
    size, tokens = SIZES[2], 16_000_000
    half = end(size, tokens // 2, TRUE.loss(size, tokens), arm="grown", growth=Growth(10), name="grown")
    law = fit(flat_points(ends))
    draws = bootstrap(ends, law, draws=30)
    (worth,) = worth_of_arms([*ends, half], law, draws)
    assert worth.speedup == pytest.approx(2.0, rel=0.15)
    assert worth.interval is not None
    low, high = worth.interval
    assert low < 2.0 < high
    assert bootstrap(ends, law, draws=2) == draws[:2]  # a fixed seed
    never = dataclasses.replace(half, val_loss=0.5)
    assert worth_of_arms([*ends, never], law, draws)[0].speedup is None


@pytest.mark.parametrize(
    ("ends", "fault"),
    [
        (drawn(sizes=SIZES[:3]), "3 sizes of flat models with 2 horizons or more, expected 4"),
        (drawn(tokens=TOKENS[:1]), "0 sizes of flat models"),
        (
            [end(size, count, 2.0) for size in SIZES for count in (1_000_000, 1_100_000)],
            "at no budget are three sizes measured",
        ),
    ],
)
def test_too_few_points_are_refused(ends: list[End], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        best_sizes(flat_points(ends))


def test_a_law_needs_three_sizes_of_three() -> None:
    with pytest.raises(UserError, match="a law needs 3 sizes with 3 horizons each"):
        fit(flat_points(drawn(tokens=TOKENS[:2])))


def test_the_door_writes_what_a_dry_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ends(tmp_path / "ends.json", at_equal_flops(1e12, 8e12))
    out = tmp_path / "out"
    assert main(["frontier", str(tmp_path / "ends.json"), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["frontier.json", "frontier.md", "frontier.png"]
    assert "No law is fitted" in capsys.readouterr().out
    assert json.loads((out / "frontier.json").read_text())["law"] is None
    assert main(["frontier", str(tmp_path / "none.json")]) == 2
    run = ["experiment=when_growth_pays", "dry_run=true", "forecast.gpus=1", "schedule.horizons=[]"]
    own = [*run, f"forecast.frontier={out}/frontier.json"]
    warned = "111,744 parameters in matrices and head is larger than the best size of the frontier"
    assert warned in tell(compose([*own, "train.budget_tokens=1179648"]))  # 1e12 FLOPs
    assert "frontier" not in tell(compose([*own, "train.budget_tokens=9420800"]))  # 8e12
    assert "it says nothing about" in tell(compose([*own, "train.budget_tokens=94208000"]))
    assert "frontier" not in tell(compose([*run, "train.budget_tokens=1179648"]))
    (out / "frontier.json").write_text("{}")
    with pytest.raises(UserError, match=r"forecast\.frontier: .* is no frontier"):
        tell(compose([*own, "train.budget_tokens=1179648"]))
