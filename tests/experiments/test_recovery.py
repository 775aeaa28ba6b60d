"""Recovery from a growth inside a run, by hand: losses are drawn here, and every number is read off them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from helpers.runs import fabricate
from outgrow.experiments.ends import End, end_of, read_ends, write_ends
from outgrow.experiments.grown_run import Growth, MetricsRow, read_growth, tokens_until_back
from outgrow.experiments.horizon_report import RECOVERY_HEADINGS, markdown, recovery_cells
from outgrow.experiments.horizons import best_points, worths
from outgrow.experiments.recovery import MixingTime, mixing_time, recoveries
from outgrow.experiments.runs import read_runs
from outgrow.model.base.errors import UserError

GROWN = Growth(tokens=2_000_000, loss_before=3.0, loss_after=3.4, over_tokens=500_000)


def end(arm: str, millions: int, loss: float, growth: Growth | None = None, **more: object) -> End:
    small = arm == "small"
    return dataclasses.replace(
        End(
            *(f"{arm}-{millions}", arm, "muon", 1e-2, 4096, 0, 300 if small else 1000, millions * 10**6),
            *(millions * (0.3e12 if small else 1e12), 0.0, loss, 4096, "cpu", "text", growth),
        ),
        **more,  # type: ignore[arg-type]
    )


ENDS = [
    *(end("scratch", 4, 2.5), end("scratch", 8, 2.2), end("scratch", 16, 2.0)),
    *(end("small", 4, 2.9), end("small", 8, 2.8)),
    *(end("stack", 4, 2.6, GROWN), end("stack", 8, 2.215, GROWN), end("stack", 16, 1.99, GROWN)),
]


def test_r_is_the_share_of_the_way_from_the_control_to_scratch() -> None:
    measured = recoveries(best_points(ENDS), "scratch")
    assert [recovery.point.tokens for recovery in measured] == [4_000_000, 8_000_000, 16_000_000]
    assert [recovery.gap for recovery in measured] == pytest.approx([0.1, 0.015, -0.01])
    assert [recovery.share for recovery in measured[:2]] == pytest.approx([0.3 / 0.4, 0.585 / 0.6])
    assert measured[2].share is None  # the control was not trained that long
    assert [recovery.spike for recovery in measured] == pytest.approx([0.4, 0.4, 0.4])
    assert [recovery.tokens_after for recovery in measured] == [2_000_000, 6_000_000, 14_000_000]
    # from 0.015 at 6 M to -0.01 at 14 M after the growth: 0.005 is two fifths of the way, in log tokens
    assert measured[0].mixing == MixingTime(pytest.approx(6e6 * (14 / 6) ** 0.4))


def test_an_arm_of_one_seed_is_held_against_scratch_and_control_of_that_seed() -> None:
    other_seed = [end("scratch", 8, 1.0, seed=1), end("small", 8, 1.5, seed=1)]
    measured = recoveries(best_points([*ENDS, *other_seed]), "scratch")
    assert measured[1].gap == pytest.approx(0.015)
    assert measured[1].share == pytest.approx(0.585 / 0.6)
    stranger = [dataclasses.replace(one, seed=2) if one.arm == "stack" else one for one in ENDS]
    assert {(one.gap, one.share) for one in recoveries(best_points(stranger), "scratch")} == {(None, None)}


def test_an_arm_that_grows_at_a_share_of_each_horizon_has_a_t_mix_for_each() -> None:
    later = dataclasses.replace(GROWN, tokens=6_000_000)
    ends = [*ENDS[:5], end("stack", 4, 2.6, GROWN), end("stack", 8, 2.202, later)]
    measured = recoveries(best_points(ends), "scratch")
    assert [recovery.mixing for recovery in measured] == [
        MixingTime(2_000_000, ">"),
        MixingTime(2_000_000, "≤"),
    ]


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([], None),
        ([(10, 0.004), (20, 0.001)], MixingTime(10, "≤")),
        ([(10, 0.1), (20, 0.006)], MixingTime(20, ">")),
        ([(10, 0.004), (20, 0.02), (40, 0.0)], MixingTime(pytest.approx(20 * 2**0.75))),  # for good
        ([(40, 0.005), (10, 0.015)], MixingTime(40)),
    ],
)
def test_t_mix_is_where_the_gap_has_closed_for_good(
    gaps: list[tuple[int, float]], expected: MixingTime | None
) -> None:
    assert mixing_time(gaps) == expected


def test_another_optimizers_scratch_is_no_measure_of_recovery() -> None:
    others = [dataclasses.replace(e, optimizer="adamw") for e in ENDS if e.arm != "stack"]
    grown = [e for e in ENDS if e.arm == "stack"]
    measured = recoveries(best_points([*others, *grown]), "scratch")
    assert {(recovery.gap, recovery.share, recovery.mixing) for recovery in measured} == {(None, None, None)}


def test_the_spike_is_over_when_a_window_of_the_training_loss_is_back() -> None:
    losses = [*(3.0,) * 4, 3.6, 3.2, 2.7, 3.1, 3.0, 2.9]
    rows = [MetricsRow("train", 100 * place, loss) for place, loss in enumerate(losses, start=1)]
    # the windows of four after token 400: 3.15, 3.0, 2.925
    assert tokens_until_back(rows, 400) == 500
    assert tokens_until_back(rows[:8], 400) is None
    assert tokens_until_back(rows, 0) is None  # no loss before it


DECAYED = {  # what a run's record says beside its curve
    "settings.schedule": {"name": "wsd", "decay_fraction": 0.2, "floor": 0.0},
    "settings.optimizer": {"name": "muon", "learning_rate": 0.01},
    "settings.train": {"eval_tokens": 64, "context": 8, "batch_tokens": 8, "budget_tokens": 300},
    "target_config": {"vocab_size": 4, "hidden_size": 2},
}


def test_the_growth_is_read_from_the_metrics(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, "stack", [4.0, 3.0, 2.5, 2.0], **DECAYED)
    assert end_of(read_runs([folder])[0][0]).growth is None
    rows = [{"kind": "train", "tokens": 100, "loss": 3.0}]
    rows += [{"kind": "before_growth", "tokens": 100, "val_loss": 3.1}]
    rows += [{"kind": "growth", "tokens": 100, "val_loss": 3.6}]
    rows += [{"kind": "train", "tokens": 100 + 10 * n, "loss": 3.0} for n in range(1, 5)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    own = end_of(read_runs([folder])[0][0])
    assert own.growth == Growth(tokens=100, loss_before=3.1, loss_after=3.6, over_tokens=40)
    write_ends(tmp_path / "ends.json", [own, *ENDS])
    assert own in read_ends(tmp_path / "ends.json")
    assert '"growth": null' not in (tmp_path / "ends.json").read_text()


def test_a_mixtures_end_tells_what_each_token_meets(tmp_path: Path) -> None:
    """Of 100 parameters a token meets 60; 8 of both are the embedding table's."""
    counts = {"parameters": 100, "active_parameters": 60}
    folder = fabricate(tmp_path, "upcycle", [4.0, 3.0], **DECAYED, **counts)
    own = end_of(read_runs([folder])[0][0])
    assert (own.parameters, own.active) == (92, 52)
    assert own.tokens_per_parameter == own.tokens / 52
    dense = fabricate(tmp_path, "scratch", [4.0, 3.0], **DECAYED)
    assert end_of(read_runs([dense])[0][0]).active is None


def test_a_run_of_before_the_spike_was_measured_has_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "growth", "tokens": 7, "val_loss": 3.0}) + "\n")
    growth = read_growth(path, "run it again")
    assert growth == Growth(7, None, 3.0, None)
    assert growth.spike is None
    path.write_text('{"kind": "growth", "tokens": 7}\n' * 2)
    with pytest.raises(UserError, match="line 1: no row of a run's metrics"):
        read_growth(path, "run it again")


def test_the_table_tells_what_is_known() -> None:
    rows = worths(ENDS)
    lines = recovery_cells(rows)
    mixed = f"{6 * math.pow(14 / 6, 0.4):.1f} M"
    assert lines[0] == ["stack", "muon", "4.0 M", "2.0 M", "+0.400", "0.5 M", "+0.1000", "0.75", mixed]
    assert lines[2][-2:] == ["–", mixed]
    assert all(len(line) == len(RECOVERY_HEADINGS) for line in lines)
    assert "| stack | muon | 4.0 M | 2.0 M | +0.400 |" in markdown(rows)
    assert "Recovery" not in markdown(worths([e for e in ENDS if e.growth is None]))
