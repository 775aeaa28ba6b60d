"""The answer of a study's horizons, in two or three sentences made of its ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from outgrow.experiments.cost import undecided
from outgrow.experiments.horizons import Bound, Point, Speedup, Worth
from outgrow.experiments.runs import NULL_CONTROL, SCRATCH

LEAST_SAVED = 1e-6  # of a token's FLOPs, by growing on the way: sums of one model differ less
NONE_GREW = "No arm grew, so nothing can be said of a speed-up."
THERE = "where the source is there already"
PAYS = "growth pays"
UNTOLD = "the seeds do not tell whether growth pays"


def answer(rows: Sequence[Worth], *, source_paid: bool = True) -> str:
    """The finding: what the best grown arm is worth at the longest horizon that one has with seeds enough to
    decide, at which shorter one it paid if it does not there, and where the control ends for the same FLOPs.

    Args:
        source_paid: the verdict is on S with the source's training counted; else it is taken as there.
    """
    best = best_grown(rows, source_paid=source_paid)
    if best is None:
        return NONE_GREW
    other = _other_way(best, source_paid)
    finding = _finding(best, source_paid, other)
    return f"{finding}{_last_paid(best, rows, source_paid)} {_control(best, rows, source_paid)}"


def headline(rows: Sequence[Worth], *, source_paid: bool = True) -> str:
    """The answer without the control, with the one way of counting that it is about."""
    best = best_grown(rows, source_paid=source_paid)
    if best is None:
        return NONE_GREW
    return f"{_finding(best, source_paid)}{_last_paid(best, rows, source_paid)}"


def best_grown(rows: Sequence[Worth], *, source_paid: bool) -> Worth | None:
    """The grown arm's end that the answer is about; None where no arm grew."""
    grown = [row for row in rows if is_grown(row, rows)]
    return max(grown, key=lambda row: merit(row, source_paid=source_paid), default=None)


def merit(row: Worth, *, source_paid: bool) -> tuple[bool, int, float, float]:
    """Seeds enough to decide first, then the longest horizon; there the largest speed-up, then the lowest
    loss.
    """
    point = row.point
    decides = not undecided(len(point.ends))
    least = row.speedup(source_paid=source_paid).least
    return decides, point.tokens, least, -point.val_loss


def _finding(best: Worth, source_paid: bool, other: str = "") -> str:
    """A sentence on the best end: the verdict, and its speed-up; `other` is the one counted the other way."""
    point = best.point
    seeds = seeds_text(end.seed for end in point.ends)
    verdict = _verdict(best, source_paid)
    relation = _relation(best.speedup(source_paid=source_paid))
    way = _way(best, source_paid)
    return (
        f"At {point.tokens_per_parameter:.0f} tokens a parameter {verdict}: {point.arm} is worth S "
        f"{relation} against scratch{way}{other} ({seeds})."
    )


def _last_paid(best: Worth, rows: Sequence[Worth], source_paid: bool) -> str:
    """A sentence on the longest horizon at which the same arm did pay; nothing where it pays at its end, or
    never did.
    """
    own = [row for row in rows if row.point.arm == best.point.arm]
    paying = [row for row in own if _verdict(row, source_paid) == PAYS]
    if best in paying or not paying:
        return ""
    last = max(paying, key=lambda row: row.point.tokens)
    relation = _relation(last.speedup(source_paid=source_paid))
    return f" At {last.point.tokens_per_parameter:.0f} it paid: S {relation}."


def _way(best: Worth, source_paid: bool) -> str:
    """How the speed-up of a finding is counted, in words."""
    return ", everything paid" if source_paid or not _has_source(best) else f" {THERE}"


def _other_way(best: Worth, source_paid: bool) -> str:
    """The speed-up that is counted the other way; nothing without a source."""
    if not _has_source(best):
        return ""
    relation = _relation(best.speedup(source_paid=not source_paid))
    way = THERE if source_paid else "with everything paid"
    return f", and S {relation} {way}"


def _has_source(row: Worth) -> bool:
    return any(end.source_flops for end in row.point.ends)


def _relation(speedup: Speedup) -> str:
    """A speed-up as the end of a sentence: = 1.21 ± 0.27, > 0.93."""
    if speedup.value is None:
        return str(speedup.bound)
    interval = "" if speedup.half is None else f" ± {speedup.half:.2f}"
    return f"= {speedup.value:.2f}{interval}"


def _verdict(row: Worth, source_paid: bool) -> str:
    """The verdict on growth, which too few seeds call undecided; an interval that holds break-even gives
    none, nor does a bound on its other side. A bound is the mean's alone, so the seeds decide there too.
    """
    doubt = undecided(len(row.point.ends))
    clause = f" ({doubt})" if doubt else ""
    speedup = row.speedup(source_paid=source_paid)
    if speedup.value is None:
        assert speedup.bound is not None
        if source_paid and _difference_holds_zero(row):
            return UNTOLD
        return _verdict_of_bound(speedup.bound, clause)
    if _holds_break_even(row, speedup, source_paid):
        return UNTOLD
    return f"{PAYS}{clause}" if speedup.value > 1.0 else f"growth does not pay{clause}"


def _holds_break_even(row: Worth, speedup: Speedup, source_paid: bool) -> bool:
    """Check whether the seeds leave both open. A seed outside of its own scratch's curve has no speed-up, so
    there is no interval of S; the difference at equal FLOPs, which reaches further and counts the source,
    decides then. Seeds that have neither decide nothing.
    """
    assert speedup.value is not None
    if speedup.half is not None:
        return abs(speedup.value - 1.0) <= speedup.half
    if not source_paid:
        return len(row.seeds) > 1
    if row.difference is None or row.difference_interval is None:
        return not undecided(len(row.seeds))  # of fewer, the sentence itself says so
    return _difference_holds_zero(row)


def _difference_holds_zero(row: Worth) -> bool:
    """Check whether the seeds leave open which is lower at equal FLOPs; no where they have no interval."""
    if row.difference is None or row.difference_interval is None:
        return False
    return abs(row.difference) <= row.difference_interval


def _verdict_of_bound(bound: Bound, clause: str) -> str:
    """The verdict, with its clause, where scratch's curve ends before the loss, or begins after it."""
    if bound.side == ">":
        pays = bound.value >= 1.0
        return f"{PAYS}{clause}" if pays else "scratch ends too early to tell whether growth pays"
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
    own = [other.point.ends[0] for other in rows if other.point.arm == SCRATCH]
    rates = [end.flops / end.tokens for end in own if end.parameters == first.parameters]
    return bool(rates) and first.flops / first.tokens < (1 - LEAST_SAVED) * min(rates)


def is_control(row: Worth, rows: Sequence[Worth]) -> bool:
    """Check for a network that stays smaller than scratch's: trained longer, not bigger."""
    full_size = max(other.point.parameters for other in rows if other.point.arm == SCRATCH)
    return row.point.parameters < full_size


def control_of(best: Worth, rows: Sequence[Worth], *, source_paid: bool) -> Point:
    """The control's end that cost most nearly what `best` did."""
    controls = [row.point for row in rows if is_control(row, rows)]
    plain = [point for point in controls if point.arm != NULL_CONTROL]
    own = best.point

    def distance(point: Point) -> tuple[float, float]:
        ratio = point.cost(source_paid=source_paid) / own.cost(source_paid=source_paid)
        return abs(math.log(ratio)), point.val_loss

    return min(plain or controls, key=distance)


def _control(best: Worth, rows: Sequence[Worth], source_paid: bool) -> str:
    """A sentence on the control's end against that of `best`."""
    near = control_of(best, rows, source_paid=source_paid)
    own = best.point
    gap = near.val_loss - own.val_loss
    side = "higher" if gap > 0 else "lower"
    near_teraflop = near.cost(source_paid=source_paid) / 1e12
    own_teraflop = own.cost(source_paid=source_paid) / 1e12
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
