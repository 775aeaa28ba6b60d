"""The learning rate against points computed by hand."""

from __future__ import annotations

import math

import pytest

from outgrow.train.schedule import REWARM, SCHEDULES, factor
from outgrow.train.settings import ScheduleSettings

WSD = ScheduleSettings(name="wsd", warmup_fraction=0.1, decay_fraction=0.25, floor=0.0, rewarm="full")
COSINE = ScheduleSettings(name="cosine", warmup_fraction=0.2, floor=0.1, rewarm="full")


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.5, 1.0), (0.75, 1.0), (0.875, 0.5), (0.95, 0.2), (1.0, 0.0)],
)
def test_wsd_rises_stays_and_falls_linearly(progress: float, expected: float) -> None:
    assert factor(WSD, progress, from_scratch=True) == pytest.approx(expected)


def test_wsd_falls_to_its_floor() -> None:
    settings = ScheduleSettings(name="wsd", warmup_fraction=0.0, decay_fraction=0.5, floor=0.2, rewarm="full")
    assert [factor(settings, p, from_scratch=True) for p in (0.0, 0.5, 0.75, 1.0)] == pytest.approx(
        [1.0, 1.0, 0.6, 0.2]
    )


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.1, 0.5), (0.2, 1.0), (0.6, 0.55), (0.4, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), (1.0, 0.1)],
)
def test_cosine_rises_and_swings_down_to_its_floor(progress: float, expected: float) -> None:
    assert factor(COSINE, progress, from_scratch=True) == pytest.approx(expected)


def test_rewarming_shortens_the_rise_of_a_warm_start_only() -> None:
    for rewarm, peak_at in (("full", 0.1), ("short", 0.025), ("none", 0.0)):
        settings = ScheduleSettings(
            name="wsd", warmup_fraction=0.1, decay_fraction=0.25, floor=0.0, rewarm=rewarm
        )
        assert factor(settings, 0.05, from_scratch=True) == pytest.approx(0.5)
        assert factor(settings, peak_at, from_scratch=False) == pytest.approx(1.0)
        assert factor(settings, peak_at / 2, from_scratch=False) == pytest.approx(0.5 if peak_at else 1.0)
        assert factor(settings, 0.875, from_scratch=False) == pytest.approx(0.5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rewarm", REWARM)
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_every_schedule_stays_between_zero_and_the_peak(name: str, rewarm: str, warmup: float) -> None:
    settings = ScheduleSettings(
        name=name,
        warmup_fraction=warmup,
        decay_fraction=0.0 if warmup == 1 else 0.4,
        floor=0.05,
        rewarm=rewarm,
    )
    values = [factor(settings, i / 50, from_scratch=scratch) for i in range(51) for scratch in (True, False)]
    assert all(0 <= value <= 1 for value in values)
    assert max(values) == pytest.approx(1.0)
