"""The arithmetic of a saving, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from outgrow.experiments.cost import Curve, cost, half_interval, loss_at, mean_curve, reach, saving

#                tokens             FLOPs (10 a token)        losses
SCRATCH = Curve((0, 100, 200, 300), (0, 1000, 2000, 3000), (8.0, 6.0, 5.0, 4.0))


def curve(*losses: float) -> Curve:
    return Curve(SCRATCH.tokens, SCRATCH.flops, losses)


def test_a_crossing_is_linear_in_the_loss() -> None:
    assert reach((0, 100, 200), (8.0, 6.0, 4.0), 5.0) == 150
    assert reach((0, 100, 200), (8.0, 6.0, 2.0), 5.0) == 125
    assert reach((0, 100, 200), (8.0, 6.0, 4.0), 6.0) == 100  # exactly at an evaluation
    assert reach((0, 100, 200), (8.0, 6.0, 4.0), 4.0) == 200  # exactly at the end
    assert reach((0, 100, 200), (8.0, 6.0, 4.0), 3.9) is None
    assert reach((0, 100, 200), (8.0, 6.0, 4.0), 8.0) == 0  # there before the first step
    assert reach((0, 1), (5.0, 6.0), 5.0) is None  # it does not stay
    assert reach((0, 1, 2, 3), (8.0, 4.0, 6.0, 2.0), 5.0) == 2.25  # the last time, since it rises in between
    assert reach((0, 1, 2, 3), (8.0, 4.0, 5.0, 5.0), 5.0) == 0.75  # the first time, since it stays


def test_a_loss_is_read_between_evaluations_and_not_beyond() -> None:
    positions, losses = (0, 100, 200), (8.0, 6.0, 2.0)
    assert [loss_at(positions, losses, at) for at in (0, 50, 100, 175, 200, 201)] == [
        8.0,
        7.0,
        6.0,
        3.0,
        2.0,
        2.0,
    ]
    assert loss_at(positions, losses, 203) is None
    assert loss_at(positions, losses, -1) is None


def test_speed_up_and_saving_both_ways() -> None:
    """The arm reaches 4.0 half-way between 100 and 200 tokens: 1,500 of scratch's 3,000 FLOPs; its source
    cost 900."""
    found = cost(curve(7.0, 5.0, 3.0, 2.0), SCRATCH, source_flops=900.0)
    assert (found.outcome, found.tokens, found.flops_excluded, found.flops_included) == (
        "reached",
        150,
        1500,
        2400,
    )
    assert (found.speedup_excluded, found.speedup_included) == (2.0, 1.25)
    assert found.saving_excluded == 0.5
    assert found.saving_included == pytest.approx(0.2)
    assert found.difference_excluded == -2.0
    # it had 2,100 FLOPs left for itself: a tenth of the way from 3.0 to 2.0
    assert found.difference_included == pytest.approx(2.9 - 4.0)


def test_the_operators_own_steps_are_paid() -> None:
    found = cost(curve(7.0, 5.0, 3.0, 2.0), SCRATCH, operator_flops=500.0, source_flops=1000.0)
    assert (found.flops_excluded, found.flops_included) == (2000, 3000)
    assert (found.speedup_excluded, found.speedup_included) == (1.5, 1.0)
    assert found.difference_excluded == 2.5 - 4.0  # read at 2,500 of its own FLOPs
    assert found.difference_included == 4.0 - 4.0  # and at 1,500


def test_a_source_can_cost_more_than_it_saves() -> None:
    found = cost(curve(7.0, 5.0, 3.0, 2.0), SCRATCH, source_flops=4500.0)
    assert (found.speedup_included, found.saving_included) == (0.5, -1.0)
    assert found.difference_included is None  # it alone cost more than scratch did in all
    assert cost(curve(7.0, 5.0, 3.0, 2.0), SCRATCH, source_flops=None).speedup_included is None


def test_an_arm_that_starts_below_gets_a_difference_and_no_ratio() -> None:
    found = cost(curve(3.9, 3.8, 3.7, 3.5), SCRATCH, source_flops=1500.0)
    assert (found.outcome, found.tokens, found.speedup_excluded, found.saving_excluded) == (
        "starts below",
        0,
        None,
        None,
    )
    assert found.difference_excluded == -0.5
    assert found.speedup_included == 2.0  # its source has to be paid, so that ratio is finite
    assert cost(curve(4.0, 3.8, 3.7, 3.5), SCRATCH).outcome == "starts below"
    assert cost(curve(4.0, 3.8, 3.7, 3.5), SCRATCH).speedup_included is None
    assert cost(curve(3.9, 3.8, 3.7, 3.5), SCRATCH, operator_flops=10.0).speedup_excluded is None


def test_an_arm_that_never_gets_there_says_so() -> None:
    found = cost(curve(8.0, 7.0, 6.0, 4.25), SCRATCH, source_flops=100.0)
    assert (
        found.outcome,
        found.tokens,
        found.flops_excluded,
        found.speedup_excluded,
        found.speedup_included,
    ) == (
        "not reached",
        *[None] * 4,
    )
    assert found.difference_excluded == 0.25


def test_a_dip_saves_nothing() -> None:
    """Below scratch's final loss once, and 0.2 nats above it at the end; and the same for an arm that starts
    there."""
    for dipped in (curve(8.0, 3.9, 4.5, 4.2), curve(3.9, 4.5, 4.3, 4.2)):
        found = cost(dipped, SCRATCH)
        assert (found.outcome, found.tokens, found.speedup_excluded, found.speedup_included) == (
            "not reached",
            *[None] * 3,
        )
        assert found.difference_at_end == pytest.approx(0.2)
    assert cost(curve(8.0, 3.9, 4.5, 3.5), SCRATCH).flops_excluded == 2500  # it comes back for good


def test_scratch_is_read_by_its_own_rule() -> None:
    assert cost(SCRATCH, SCRATCH).speedup_excluded == 1.0
    # had its final loss at 1,000 FLOPs already: the later ones are no merit of a rival
    early = curve(8.0, 4.0, 3.0, 4.0)
    assert cost(curve(8.0, 6.0, 4.0, 3.0), early).speedup_excluded == 0.5


def test_a_speed_up_is_no_saving() -> None:
    assert saving(1.546) == pytest.approx(0.353, abs=5e-4)  # "54.6 % faster" saves 35.3 %
    assert saving(None) is None


def test_the_interval_is_students() -> None:
    """t(0.975) from the printed tables: 12.7062 at 1, 4.3027 at 2, 2.7764 at 4 degrees of freedom."""
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert half_interval([1.0, 2.0]) == pytest.approx(12.7062 * math.sqrt(0.5) / math.sqrt(2), rel=1e-4)
    assert half_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(
        2.7764 * math.sqrt(2.5) / math.sqrt(5), rel=1e-4
    )
    assert half_interval([1.0]) is None


def test_a_mean_needs_the_same_evaluations() -> None:
    assert mean_curve([curve(8.0, 6.0, 4.0, 2.0), curve(6.0, 5.0, 4.0, 3.0)]).losses == (7.0, 5.5, 4.0, 2.5)
    with pytest.raises(ValueError, match="different tokens"):
        mean_curve([SCRATCH, Curve((0, 100), (0, 1000), (8.0, 6.0))])
