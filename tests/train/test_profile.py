"""A trace of some steps: what it holds, that it changes nothing, and ranges that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.toy import assert_same_run, at
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.run.clock import Meter
from outgrow.train.run.profile import Profile, profiling
from outgrow.train.run.state import Position
from outgrow.train.settings import Settings, settings_hash


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)


def names(trace: Path) -> set[str]:
    return {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}


def clock(step: int = 0) -> Meter:
    return Meter(Position(step=step), 1, 1, (), None)


@pytest.mark.slow
def test_a_traced_run_is_the_run_that_nobody_traced(settings: Settings, tmp_path: Path) -> None:
    plain = loop.train(at(settings, tmp_path / "plain"))
    traced = loop.train(at(settings, tmp_path / "traced", profile_steps="2-3"))
    assert_same_run(plain, traced)
    assert settings_hash(at(settings, plain)) == settings_hash(at(settings, traced, profile_steps="2-3"))
    assert [path.name for path in (traced / "profile").iterdir()] == ["steps-2-3.json"]
    inside = names(traced / "profile" / "steps-2-3.json")
    assert {"step 2", "step 3", "aten::mm"} <= inside
    assert not {"step 1", "step 4"} & inside
    assert not (plain / "profile").exists()


def test_a_run_that_ends_early_or_begins_late_leaves_the_steps_that_there_were(tmp_path: Path) -> None:
    said: list[str] = []

    def stopped() -> None:
        with profiling(tmp_path, range(2, 6), 1, clock(step=2), said.append) as profile:
            for number in (3, 4):
                with profile.step(number):
                    pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert {"step 3", "step 4"} <= names(tmp_path / "profile" / "steps-3-4-process-1.json")
    assert said == []


def test_a_step_that_fails_last_ends_the_trace(tmp_path: Path) -> None:
    profile = Profile(tmp_path, range(1, 2), 0, clock())
    with pytest.raises(UserError, match="not finite"), profile.step(1):
        raise UserError("not finite")
    assert profile.profiler is None
    assert (tmp_path / "profile" / "steps-1-1.json").is_file()


def test_steps_that_are_trained_already_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    with profiling(tmp_path, range(2, 4), 0, clock(step=3), said.append):
        pass
    assert said == ["train.profile_steps=2-3: the run is after step 3; nothing is traced"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", ["0-2", "3-2", "5-7", "2", "2-", "a-b", "2-3-4", "-1-2"])
def test_a_range_that_is_none_is_refused(overrides: list[str], steps: str) -> None:
    with pytest.raises(
        UserError, match=r"train\.profile_steps: expected FIRST-LAST, .* of which this run has 6"
    ):
        compose([*overrides, f"train.profile_steps={steps}"])


def test_a_range_may_reach_to_the_longest_horizon(overrides: list[str]) -> None:
    longer = ["schedule.warmup_tokens=128", "schedule.horizons=[384,1280]"]
    assert compose([*overrides, *longer, "train.profile_steps=9-10"]).train.profiled == range(9, 11)
    with pytest.raises(UserError, match="of which this run has 10; found '9-11'"):
        compose([*overrides, *longer, "train.profile_steps=9-11"])
