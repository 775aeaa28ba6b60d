"""The learning rate as a pure function of progress: no state, no scheduler object, the same for every world
size and restart.

Progress is the share of the token budget, in [0, 1]. A step is taken at its middle, (step + ½) / steps, so
that neither the first nor the last step is wasted on a rate of zero.

A warm-up of so many tokens (`warmup_tokens`) does not depend on the budget: until the decay of the shorter
one begins, two WSD runs that differ in their budget alone have the same rate at every step, to the bit.
Horizons rest on this (train/horizons.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# The share of the warm-up that a run repeats when it does not start from scratch; "new" repeats it for new
# entries alone.
REWARM = {"full": 1.0, "short": 0.25, "none": 0.0, "new": 0.0}


@dataclass(frozen=True)
class ScheduleSettings:
    """conf/schedule; fractions are of the run's budget."""

    name: str  # a key of train.schedule.SCHEDULES
    warmup_fraction: float  # of the budget
    floor: float  # the last rate, as a share of the peak
    # a key of train.schedule.REWARM: how much of the warm-up a run repeats that starts from trained weights
    rewarm: str
    decay_fraction: float | None = None  # of the budget; wsd only
    warmup_tokens: int | None = None  # instead of warmup_fraction: the same for every budget
    decay: Literal["linear", "sqrt"] = "linear"  # the shape of WSD's decay; sqrt: 1 − √share
    # budgets in tokens, each decayed from one stable trunk, see train/horizons.py
    horizons: tuple[int, ...] = ()


def warmup_stable_decay(progress: float, warmup: float, settings: ScheduleSettings) -> float:
    """Linear from 0 to 1, flat, then down to `floor` over the last `decay_fraction` of the budget (WSD, arXiv
    2404.06395).

    The decay is linear, or 1 − √(share of the decay that is over) (arXiv 2405.18392).
    """
    assert settings.decay_fraction is not None
    rise = progress / warmup if warmup > 0 else 1.0
    left = 1.0 - progress
    decay = settings.decay_fraction
    fall = left / decay if decay > 0 else 1.0
    if settings.decay == "sqrt" and fall < 1.0:
        fall = 1.0 - math.sqrt(1.0 - fall)
    above_floor = (1.0 - settings.floor) * fall
    lowered = settings.floor + above_floor
    return min(1.0, rise, lowered)


def cosine(progress: float, warmup: float, settings: ScheduleSettings) -> float:
    """Linear from 0 to 1, then half a cosine down to `floor` at the end of the budget (arXiv 1608.03983, one
    cycle).
    """
    if progress < warmup or warmup == 1.0:
        return progress / warmup
    turn = (progress - warmup) / (1.0 - warmup)
    wave = 1.0 + math.cos(math.pi * turn)
    above_floor = (1.0 - settings.floor) * 0.5 * wave
    return settings.floor + above_floor


Schedule = Callable[[float, float, ScheduleSettings], float]
SCHEDULES: dict[str, Schedule] = {"wsd": warmup_stable_decay, "cosine": cosine}


def factor(
    settings: ScheduleSettings,
    progress: float,
    *,
    from_scratch: bool,
    tokens: float | None = None,
) -> float:
    """The learning rate at `progress` as a share of its peak.

    A run that starts from trained weights warms up for `REWARM[settings.rewarm]` of the warm-up that scratch
    gets.

    Args:
        tokens: at `progress`; needed where the warm-up is given in tokens.
    """
    share = 1.0 if from_scratch else REWARM[settings.rewarm]
    progress = min(max(progress, 0.0), 1.0)
    course = SCHEDULES[settings.name]
    if settings.warmup_tokens is None:
        fraction = settings.warmup_fraction * share
        return course(progress, fraction, settings)
    assert tokens is not None
    warmup = settings.warmup_tokens * share
    rise = min(1.0, tokens / warmup) if warmup > 0 else 1.0
    without_warmup = course(progress, 0.0, settings)
    return min(rise, without_warmup)


def stable_steps(settings: ScheduleSettings, steps: int) -> int:
    """The first steps of a WSD run of `steps` that its decay does not touch: 0.25 of 100 steps → 75."""
    assert settings.decay_fraction is not None
    stable = steps * (1.0 - settings.decay_fraction)
    return min(steps, math.floor(stable + 0.5))


def new_entries(settings: ScheduleSettings, progress: float) -> float:
    """The rate of entries that growth made, as a share of the others': they warm up alone where the schedule
    rewarms "new".
    """
    if settings.rewarm != "new" or settings.warmup_fraction == 0.0:
        return 1.0
    return min(1.0, progress / settings.warmup_fraction)
