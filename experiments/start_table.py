"""The table that says how each arm of a comparison of decayed ends started, and what it read."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from outgrow.experiments.ends import End
from outgrow.experiments.horizons import Point
from outgrow.experiments.table import UNDEFINED

STARTED = "How each arm started and what it read"
START_NOTE = (
    "Lossless is what the certificate says; the loss at step 0 is the validation loss before the first step, "
    "the mean of the seeds; max |Δlogit| and KL hold the grown model against its source, the largest of the "
    "seeds: those of a lossless start are rounding, of weights in float32 or wider. Passes are those of the "
    "longest horizon over the training text; the text of the source is read again where both were trained on "
    "the same tokens."
)
START_HEADINGS = (
    *("arm", "optimizer", "lossless", "loss at step 0", "max |Δlogit|", "KL, nats"),
    *("passes over the text", "text of its source"),
)
CERTIFIED = {True: "yes", False: "no", None: UNDEFINED}
REREAD = {True: "read again", False: "other tokens", None: "not known"}


def start_cells(points: Iterable[Point]) -> list[list[str]]:
    """How each arm started and what it read, at its longest horizon, under START_HEADINGS; arms of which
    nothing is known are left out.
    """
    longest: dict[tuple[str, str], Point] = {}
    for point in sorted(points, key=lambda point: point.tokens):
        longest[point.arm, point.optimizer] = point
    lines = [_start_row(longest[line]) for line in sorted(longest)]
    return [line for line in lines if line is not None]


def _start_row(point: Point) -> list[str] | None:
    ends = [end for end in point.ends if end.start is not None]
    starts = [end.start for end in ends if end.start is not None]
    if not starts:
        return None
    deltas = [start.max_delta for start in starts if start.max_delta is not None]
    divergences = [start.kl for start in starts if start.kl is not None]
    first = starts[0]
    return [
        point.arm,
        point.optimizer,
        CERTIFIED[first.lossless],
        f"{fmean(start.val_loss for start in starts):.4f}",
        _known(max(deltas, default=None), "{:.2g}"),
        _known(max(divergences, default=None), "{:.2g}"),
        _known(first.passes, "{:.2f}"),
        _text_of_source(ends[0]),
    ]


def _text_of_source(end: End) -> str:
    """Whether an arm reads the text of its source again, in words."""
    if not end.source_flops:
        return UNDEFINED
    return REREAD[end.rereads]


def _known(value: float | None, form: str) -> str:
    return UNDEFINED if value is None else form.format(value)
