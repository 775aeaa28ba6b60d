"""Recovery from a growth inside a run, against scratch and the control: R and t_mix.

How far a grown arm has caught up is read from decayed ends alone, at equal tokens and of one optimizer:

    R = (control − grown) / (control − scratch)       0: as the small network, 1: as scratch
    t_mix                                             tokens after the growth until grown − scratch <= EPSILON
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from outgrow.experiments.grown_run import Growth
from outgrow.experiments.horizons import Point

EPSILON = 0.005  # nats per token: within this of scratch, a grown arm has caught up


@dataclass(frozen=True)
class MixingTime:
    """t_mix: `tokens` after the growth, or a bound on them: "≤" where the first end has caught up already,
    ">" where the last one has not.
    """

    tokens: float
    bound: str = ""


@dataclass(frozen=True)
class Recovery:
    """A grown arm's decayed end beside those of scratch and of the control, at equal tokens.

    `gap` is grown − scratch in nats, `share` is R; None where there is no such end.
    """

    point: Point
    growth: Growth
    spike: float | None  # the mean over the seeds
    gap: float | None
    share: float | None
    mixing: MixingTime | None  # of the arm, from all its horizons that grew at one moment

    @property
    def tokens_after(self) -> int:
        """The tokens between the growth and this end."""
        return self.point.tokens - self.growth.tokens


def recoveries(points: Sequence[Point], scratch: str) -> list[Recovery]:
    """The recovery of every end of a run that grew on its way, in the order of `points`.

    Args:
        scratch: the name of the arm that they are held against.
    """
    largest = max(point.parameters for point in points)
    of_scratch: dict[tuple[str, int], Point] = {}
    controls: dict[tuple[str, int], Point] = {}
    for point in points:
        if point.arm == scratch:
            of_scratch[_moment(point)] = point
        if point.parameters < largest:
            controls[_moment(point)] = point

    grown = [point for point in points if point.ends[0].growth is not None]
    measured = []
    for point in grown:
        growth = point.ends[0].growth
        assert growth is not None
        gaps: list[tuple[int, float]] = []  # (tokens after the growth, gap) of the arm's horizons
        for other in grown:
            gap = _gap(other, of_scratch)
            if _alike(other, point) and gap is not None:
                gaps.append((other.tokens - growth.tokens, gap))
        gap = _gap(point, of_scratch)
        share = _share(point, gap, controls, of_scratch)
        spike = _spike(point)
        mixing = mixing_time(gaps)
        measured.append(Recovery(point, growth, spike, gap, share, mixing))
    return measured


def _moment(point: Point) -> tuple[str, int]:
    """Optimizer and tokens, which scratch must share with an arm to be held against it."""
    return point.optimizer, point.tokens


def _alike(one: Point, other: Point) -> bool:
    """Whether two ends of grown runs are of one arm, which grew after as many tokens to both."""
    moments = {point.ends[0].growth.tokens for point in (one, other) if point.ends[0].growth is not None}
    return (one.arm, one.optimizer) == (other.arm, other.optimizer) and len(moments) == 1


def _gap(point: Point, of_scratch: Mapping[tuple[str, int], Point]) -> float | None:
    """Grown − scratch, the mean over the seeds that both have; None where they share none."""
    scratch = of_scratch.get(_moment(point))
    if scratch is None:
        return None
    losses = _paired(point, scratch)
    return losses[0] - losses[1] if losses else None


def _share(
    point: Point,
    gap: float | None,
    controls: Mapping[tuple[str, int], Point],
    of_scratch: Mapping[tuple[str, int], Point],
) -> float | None:
    """R over the seeds that all three have; None where scratch or the control has no end at these tokens, or
    scratch is not below it.
    """
    control = controls.get(_moment(point))
    if control is None or gap is None:
        return None
    losses = _paired(point, of_scratch[_moment(point)], control)
    if losses is None:
        return None
    grown, scratch, small = losses
    room = small - scratch
    return (small - grown) / room if room > 0 else None


def _paired(*points: Point) -> list[float] | None:
    """The mean loss of each point over the seeds that all of them have; None where they share none."""
    shared = set.intersection(*({end.seed for end in point.ends} for point in points))
    if not shared:
        return None
    own = ([end.val_loss for end in point.ends if end.seed in shared] for point in points)
    return [fmean(losses) for losses in own]


def _spike(point: Point) -> float | None:
    growths = (end.growth for end in point.ends)
    spikes = [growth.spike for growth in growths if growth is not None]
    numbers = [spike for spike in spikes if spike is not None]
    return fmean(numbers) if numbers else None


def mixing_time(gaps: Sequence[tuple[int, float]]) -> MixingTime | None:
    """t_mix from pairs (tokens after the growth, gap); None without any.

    It is where the gap comes down to EPSILON for good, linear in log tokens between two ends.
    """
    if not gaps:
        return None
    ordered = sorted(gaps)
    above = [number for number, (_, gap) in enumerate(ordered) if gap > EPSILON]
    if not above:
        return MixingTime(ordered[0][0], "≤")
    last = above[-1]
    if last == len(ordered) - 1:
        return MixingTime(ordered[-1][0], ">")
    start, before = ordered[last]
    end, after = ordered[last + 1]
    share = (before - EPSILON) / (before - after)
    growth = math.log(end / start)
    return MixingTime(start * math.exp(share * growth))
