"""The answer of a study's horizons, in two sentences made of its ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from outgrow.experiments.cost import undecided
from outgrow.experiments.horizons import Bound, Point, Worth
from outgrow.experiments.runs import NULL_CONTROL, SCRATCH

LEAST_SAVED = 1e-6  # of a token's FLOPs, by growing on the way: sums of one model differ less


def answer(rows: Sequence[Worth]) -> str:
    """The finding in two sentences: what the best grown arm is worth at the longest horizon that one has with
    seeds enough to decide, and where the control ends for the same FLOPs.
    """
    grown = [row for row in rows if is_grown(row, rows)]
    if not grown:
        return "No arm grew, so nothing can be said of a speed-up."
    best = max(grown, key=merit)
    point = best.point
    seeds = seeds_text(end.seed for end in point.ends)
    return (
        f"At {point.tokens_per_parameter:.0f} tokens a parameter {_verdict(best)}: {point.arm} is worth S "
        f"{_relation(best)} against scratch, everything paid{_of_a_checkpoint(best)} ({seeds}). "
        f"{_control(best, rows)}"
    )


def merit(row: Worth) -> tuple[bool, int, float, float]:
    """Seeds enough to decide first, then the longest horizon; there the largest speed-up, then the lowest
    loss.
    """
    point = row.point
    decides = not undecided(len(point.ends))
    return decides, point.tokens, least_speedup(row), -point.val_loss


def least_speedup(row: Worth) -> float:
    """The speed-up, source included, that a row is known to reach."""
    if row.speedup_included is not None:
        return row.speedup_included
    bound = row.bound_included
    if bound is None or bound.side != ">":
        return 0.0
    return bound.value


def _relation(row: Worth) -> str:
    """A row's speed-up as the end of a sentence: = 1.21 ± 0.27, > 0.93."""
    return _speedup_relation(row.speedup_included, row.bound_included, row.interval_included)


def _of_a_checkpoint(row: Worth) -> str:
    """The same without the source's own training, for whoever has the source already; nothing without one."""
    if not any(end.source_flops for end in row.point.ends):
        return ""
    own = _speedup_relation(row.speedup_excluded, row.bound_excluded, row.interval_excluded)
    return f", and S {own} where the source is there already"


def _speedup_relation(speedup: float | None, bound: Bound | None, spread: float | None) -> str:
    if speedup is None:
        return str(bound)
    interval = "" if spread is None else f" ± {spread:.2f}"
    return f"= {speedup:.2f}{interval}"


def _verdict(row: Worth) -> str:
    """The verdict on growth, which too few seeds call undecided; an interval that holds break-even gives
    none, nor does a bound on its other side.
    """
    doubt = undecided(len(row.point.ends))
    clause = f" ({doubt})" if doubt else ""
    speedup = row.speedup_included
    if speedup is None:
        assert row.bound_included is not None
        return _verdict_of_bound(row.bound_included, clause)
    if _holds_break_even(row, speedup):
        return "the seeds do not tell whether growth pays"
    return f"growth pays{clause}" if speedup > 1.0 else f"growth does not pay{clause}"


def _holds_break_even(row: Worth, speedup: float) -> bool:
    """Check whether the seeds leave both open. A seed outside of its own scratch's curve has no speed-up, so
    there is no interval of S; the difference at equal FLOPs, which reaches further, decides then.
    """
    if row.interval_included is not None:
        return abs(speedup - 1.0) <= row.interval_included
    if row.difference is None or row.difference_interval is None:
        return False
    return abs(row.difference) <= row.difference_interval


def _verdict_of_bound(bound: Bound, clause: str) -> str:
    """The verdict, with its clause, where scratch's curve ends before the loss, or begins after it."""
    if bound.side == ">":
        pays = bound.value >= 1.0
        return f"growth pays{clause}" if pays else "scratch ends too early to tell whether growth pays"
    does_not = bound.value <= 1.0
    return (
        f"growth does not pay{clause}" if does_not else "scratch begins too late to tell whether growth pays"
    )


def is_grown(row: Worth, rows: Sequence[Worth]) -> bool:
    """Check for an arm that inherited something, from a source or from its own trunk, and is no control.

    Scratch under another name, with another batch say, and flat models of other sizes did not.
    """
    if is_control(row, rows):
        return False
    first = row.point.ends[0]
    if first.growth is not None or first.source_flops > 0:
        return True
    # older records tell of no growth on the way; it shows in fewer FLOPs a token than scratch of that size
    whole = [other.point.ends[0] for other in rows if other.point.arm == SCRATCH]
    rates = [end.flops / end.tokens for end in whole if end.parameters == first.parameters]
    return bool(rates) and first.flops / first.tokens < (1 - LEAST_SAVED) * min(rates)


def is_control(row: Worth, rows: Sequence[Worth]) -> bool:
    """Check for a network that stays smaller than scratch's: trained longer, not bigger."""
    full_size = max(other.point.parameters for other in rows if other.point.arm == SCRATCH)
    return row.point.parameters < full_size


def control_of(best: Worth, rows: Sequence[Worth]) -> Point:
    """The control's end that cost most nearly what `best` did."""
    controls = [row.point for row in rows if is_control(row, rows)]
    plain = [point for point in controls if point.arm != NULL_CONTROL]
    own = best.point

    def distance(point: Point) -> tuple[float, float]:
        ratio = point.paid / own.paid
        return abs(math.log(ratio)), point.val_loss

    return min(plain or controls, key=distance)


def _control(best: Worth, rows: Sequence[Worth]) -> str:
    """A sentence on the control's end against that of `best`."""
    near = control_of(best, rows)
    own = best.point
    gap = near.val_loss - own.val_loss
    side = "higher" if gap > 0 else "lower"
    near_teraflop = near.paid / 1e12
    own_teraflop = own.paid / 1e12
    return (
        f"The control, {near.arm} trained on for {near_teraflop:.2f} TFLOP, ends {abs(gap):.3f} nats "
        f"{side} than {own.arm} for {own_teraflop:.2f}."
    )


def seeds_text(numbers: Iterable[int]) -> str:
    """Seeds in a sentence, where a bare number would read as a value: seed 0; seeds 0, 1, 2."""
    names = list(map(str, numbers))
    plural = "s" if len(names) > 1 else ""
    return f"seed{plural} {', '.join(names)}"


def seed_numbers(point: Point) -> str:
    """The seeds of a point: 0, 1, 2."""
    seeds = [str(end.seed) for end in point.ends]
    return ", ".join(seeds)


def speedup_text(value: float | None, bound: Bound | None) -> str:
    """A speed-up in two digits, or the bound that is known of it."""
    return str(bound) if value is None else f"{value:.2f}"
