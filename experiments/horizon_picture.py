"""The picture of a study's horizons: decayed ends against scratch's curve, and what each is worth.

A few lines stand out and bear their names: scratch, the control, and the grown arms that are worth most. The
others are grey; their names and numbers are in the table.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.experiments.figure import GRID, INK
from outgrow.experiments.horizon_answer import (
    answer,
    control_of,
    is_grown,
    least_speedup,
    merit,
)
from outgrow.experiments.horizons import Worth
from outgrow.experiments.labels import Label, write_names
from outgrow.experiments.runs import SCRATCH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"adamw": "o", "muon": "s", "adamw_8bit": "^"}
DASHES = {"adamw": (0, (3, 2))}
EXCLUDED = {"linestyle": (0, (1, 1.5)), "marker": "D", "markersize": 5}  # without the source's cost
TITLE_LETTERS = 94  # that the picture is wide enough for
WIDTH_INCHES, HEIGHT_INCHES = 10, 5.2
BEFORE, AFTER = 0.1, 0.45  # of the width of what is drawn: the room to its left and right
FEW = 4  # grown lines that stand out
STEEP = 3.0  # the largest speed-up by the least, from which on the axis is logarithmic
SPEEDUPS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10)  # marked on such an axis
BLACK, GREY = "#000000", "#C4C4C4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#6A3D9A")

Line = tuple[str, str]  # arm, optimizer
Style = dict[str, Any]


def draw(rows: Sequence[Worth], path: Path) -> None:
    """Write the picture: where each arm's decayed ends lie against scratch's curve, and what they are
    worth."""
    figure = build(rows)
    figure.savefig(path, dpi=150, facecolor="white")


def build(rows: Sequence[Worth]) -> Figure:
    """The figure itself, without any state of pyplot."""
    from matplotlib.figure import Figure

    lines = _by_line(rows)
    outstanding = _outstanding(rows, lines)
    styles = _styles(lines, outstanding)
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    losses, speedups = figure.subplots(1, 2)
    at_losses: list[Label] = []
    at_speedups: list[Label] = []
    for line, ends in lines.items():
        name = _name_of(line, outstanding)
        label = _plot_losses(losses, ends, styles[line], name)
        labels = [] if line[0] == SCRATCH else _plot_speedups(speedups, ends, styles[line], name)
        if line in outstanding:
            at_losses.append(label)
            at_speedups += labels
    _mark_scratch(speedups)
    _finish(
        losses,
        "TFLOP, the source included",
        "validation loss, nats/token",
        "Decayed ends: below scratch's line is cheaper than scratch",
    )
    _finish(
        speedups,
        "tokens a parameter",
        "S: scratch's FLOPs / own, at equal loss",
        "What each end is worth: above 1 is cheaper",
    )
    _scale_speedups(speedups)
    for axes in (losses, speedups):
        _leave_room(axes)
    _legend(figure, lines, outstanding)
    title = _wrapped(answer(rows))
    figure.suptitle(title, fontsize=11.5, fontweight="bold", color=INK, x=0.01, ha="left")
    at_costs, at_tokens = _places(rows)
    _set_ticks(losses, at_costs)
    _set_ticks(speedups, at_tokens)
    figure.draw_without_rendering()  # only then are the sizes known on which the texts' places depend
    for axes, places, labels in ((losses, at_costs, at_losses), (speedups, at_tokens, at_speedups)):
        _thin(axes, places)
        write_names(axes, labels, passed_over=GREY)
    return figure


# ---- which lines, and how they look ------------------------------------------------------------------------


def _by_line(rows: Sequence[Worth]) -> dict[Line, list[Worth]]:
    """The ends of each line in the order of their tokens; lines by name."""
    lines: dict[Line, list[Worth]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.point.tokens):
        lines[_line_of(row)].append(row)
    return dict(sorted(lines.items()))


def _line_of(row: Worth) -> Line:
    return row.point.arm, row.point.optimizer


def _outstanding(rows: Sequence[Worth], lines: dict[Line, list[Worth]]) -> set[Line]:
    """The lines that stand out: scratch's, that of the control in the answer, and the grown ones whose last
    ends are worth most at the longest horizons.
    """
    grown = [ends[-1] for ends in lines.values() if is_grown(ends[-1], rows)]
    grown.sort(key=merit, reverse=True)
    few = {_line_of(row) for row in grown[:FEW]}
    scratch = {line for line in lines if line[0] == SCRATCH}
    if not grown:
        return set(lines)
    control = control_of(max(rows, key=lambda row: (is_grown(row, rows), merit(row))), rows)
    return scratch | few | {(control.arm, control.optimizer)}


def _styles(lines: dict[Line, list[Worth]], outstanding: set[Line]) -> dict[Line, Style]:
    """How each line is drawn: its colour tells the arm, dashes and the markers' shape the optimizer."""
    arms = dict.fromkeys(arm for arm, _ in lines if arm != SCRATCH)
    coloured = [arm for arm in arms if any(line[0] == arm for line in outstanding)]
    colours = dict(zip(coloured, COLOURS, strict=False)) | {SCRATCH: BLACK}
    return {line: _style(line, colours[line[0]] if line in outstanding else GREY) for line in lines}


def _style(line: Line, colour: str) -> Style:
    arm, optimizer = line
    is_grey = colour == GREY
    return {
        "color": colour,
        "linestyle": DASHES.get(optimizer, "-"),
        "marker": MARKERS.get(optimizer, "o"),
        "linewidth": 2.6 if arm == SCRATCH else 1.0 if is_grey else 1.6,
        "markersize": 4 if is_grey else 7,
        "zorder": 2 if is_grey else 4,
    }


# ---- the panels --------------------------------------------------------------------------------------------


def _plot_losses(axes: Axes, rows: Sequence[Worth], style: Style, name: str) -> Label:
    """Draw the ends of one line against what they cost; return its name, for the last of them."""
    points = [row.point for row in rows]
    costs = [point.paid / 1e12 for point in points]
    losses = [point.val_loss for point in points]
    axes.plot(costs, losses, markeredgecolor="white", **style)
    # what is cheaper than scratch lies left of its line: the name does too, and leaves the line free
    is_scratch = points[-1].arm == SCRATCH
    side = "left" if is_scratch else "right"
    title = _title(rows[-1], name)
    return Label(costs[-1], losses[-1], title, style["color"], side)


def _plot_speedups(axes: Axes, rows: Sequence[Worth], style: Style, name: str) -> list[Label]:
    """Draw the speed-ups of one line against tokens a parameter, as far as they are known: dotted without the
    source's cost too, where it has a source and is not grey. Return the names of the last ends.
    """
    names = []
    if style["color"] != GREY and _has_source(rows):
        excluded = _plot_values(axes, map(Value.excluded, rows), style | EXCLUDED)
        names += [_named(excluded[-1], "", style)] if excluded else []
    included = _plot_values(axes, map(Value.included, rows), style)
    names += [_named(included[-1], f"{name} ", style)] if included else []
    return names


def _named(value: Value, name: str, style: Style) -> Label:
    return Label(value.across, value.up, f"{name}{value.up:.2f}", style["color"])


@dataclass(frozen=True)
class Value:
    """A speed-up, or None, at tokens a parameter, and half of its interval."""

    across: float
    speedup: float | None
    half: float | None

    @classmethod
    def included(cls, row: Worth) -> Value:
        return cls(row.point.tokens_per_parameter, row.speedup_included, row.interval_included)

    @classmethod
    def excluded(cls, row: Worth) -> Value:
        return cls(row.point.tokens_per_parameter, row.speedup_excluded, row.interval_excluded)

    @property
    def up(self) -> float:
        return self.speedup or 0.0


def _plot_values(axes: Axes, values: Iterable[Value], style: Style) -> list[Value]:
    """Draw those that are known, filled and with a bar where they have an interval; return them."""
    known = [value for value in values if value.speedup is not None]
    across = [value.across for value in known]
    up = [value.up for value in known]
    axes.plot(across, up, **style | {"marker": ""})
    colour = style["color"]
    for value in known:
        is_open = value.half is None
        axes.errorbar(
            [value.across],
            [value.up],
            yerr=None if is_open else [value.half or 0.0],
            capsize=3,
            markerfacecolor="white" if is_open else colour,
            markeredgecolor=colour if is_open else "white",
            **style | {"linestyle": "-"},
        )
    return known


def _has_source(rows: Sequence[Worth]) -> bool:
    return any(row.point.paid > row.point.flops for row in rows)


def _mark_scratch(axes: Axes) -> None:
    """Draw the line of S = 1."""
    axes.axhline(1.0, color=INK, linewidth=2.6)
    axes.annotate(
        "scratch",
        (0.99, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
        color=INK,
    )


def _finish(axes: Axes, across: str, up: str, title: str) -> None:
    limits = axes.dataLim
    if 0 < limits.x0 < limits.x1:
        axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _scale_speedups(axes: Axes) -> None:
    """Make the axis of speed-ups logarithmic where they differ by much: twice and half are as far from 1."""
    limits = axes.dataLim
    if limits.y0 > 0 and limits.y1 / limits.y0 > STEEP:
        axes.set_yscale("log")
        axes.set_yticks(SPEEDUPS, [f"{value:g}" for value in SPEEDUPS])
        axes.minorticks_off()


def _leave_room(axes: Axes) -> None:
    """Widen the axes beyond what is drawn, most of all to the right, where names stand."""
    axes.margins(y=0.12)
    scale = axes.get_xscale()
    ends = axes.dataLim.intervalx
    first, last = np.log(ends) if scale == "log" else ends
    width = last - first
    if width == 0:  # one place: in the middle
        axes.set_xlim(ends[0] / 2, ends[0] * 2)
    if not 0 < width < math.inf:
        return
    wider = np.array([first - BEFORE * width, last + AFTER * width])
    axes.set_xlim(*(np.exp(wider) if scale == "log" else wider))


# ---- the texts ---------------------------------------------------------------------------------------------


def _legend(figure: Figure, lines: dict[Line, list[Worth]], outstanding: set[Line]) -> None:
    """Explain what is drawn in more than one way: optimizers, the source's cost, open markers, grey lines."""
    from matplotlib.lines import Line2D

    keys: dict[str, Style] = {}
    optimizers = dict.fromkeys(optimizer for _, optimizer in lines)
    for optimizer in optimizers if len(optimizers) > 1 else ():
        keys[optimizer] = _style(("", optimizer), INK)
    shown = {line: ends for line, ends in lines.items() if line[0] != SCRATCH}
    if any(_has_source(shown[line]) for line in outstanding & shown.keys()):
        keys["dotted: the source was there, its training is not counted"] = {"color": INK} | EXCLUDED
    worth = [row for ends in shown.values() for row in ends if row.speedup_included is not None]
    without = {len(row.seeds) > 1 for row in worth if row.interval_included is None}
    reasons = {False: "one seed", True: "a seed's end lies outside of its scratch's curve"}
    if without:
        why = " or ".join(reasons[several] for several in sorted(without))
        keys[f"open: no interval ({why})"] = {
            "color": INK,
            "linestyle": "",
            "marker": "s",
            "markerfacecolor": "white",
        }
    grey = len(lines) - len(outstanding)
    if grey:
        keys[f"{grey} more in the table"] = {"color": GREY, "marker": "s", "markersize": 4}
    if keys:
        handles = [Line2D([], [], **style) for style in keys.values()]
        figure.legend(
            handles, list(keys), loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False
        )


def _wrapped(sentence: str) -> str:
    """Wrap a sentence to the picture's width, in lines of about the same length; what belongs to a number
    stays beside it.
    """
    held = re.sub(r"S ([=<>]) ", "S\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", sentence)
    held = re.sub(r"(\d) (TFLOP|nats|±)", "\\1\N{NO-BREAK SPACE}\\2", held)
    lines = math.ceil(len(held) / TITLE_LETTERS)
    even = len(held) // lines + 12
    letters = min(TITLE_LETTERS, even)
    return "\n".join(textwrap.wrap(held, letters))


def _name_of(line: Line, outstanding: set[Line]) -> str:
    """A line's name: its arm, and its optimizer where the arm stands out with another one too."""
    arm, optimizer = line
    several = sum(other == arm for other, _ in outstanding) > 1
    return f"{arm}, {optimizer}" if several else arm


def _title(row: Worth, name: str) -> str:
    """A line's name, and what its end is worth at least, where that is all the other panel could show."""
    if row.speedup_included is not None or not least_speedup(row):
        return name
    return f"{name}, S {row.bound_included}"


# the numbers of ticks, where each stands, and how many ends of grown arms or scratch stand there
Places = dict[str, tuple[float, int]]


def _places(rows: Sequence[Worth]) -> tuple[Places, Places]:
    """Where ends are: the costs of scratch's, the tokens a parameter of the others'."""
    costs: Places = {}
    tokens: Places = {}
    for row in rows:
        point = row.point
        if point.arm == SCRATCH:
            _add(costs, point.paid / 1e12, 2, 1)
        elif row.speedup_included is not None:
            _add(tokens, point.tokens_per_parameter, 0, int(is_grown(row, rows)))
    return costs, tokens


def _add(places: Places, place: float, digits: int, ends: int) -> None:
    """Count ends at a place; those of one number, rounded, share the first one's."""
    number = f"{round(place, digits):g}"
    first, before = places.get(number, (place, 0))
    places[number] = (first, before + ends)


def _set_ticks(axes: Axes, places: Places) -> None:
    across = [place for place, _ in places.values()]
    axes.set_xticks(across, list(places))


def _thin(axes: Axes, places: Places) -> None:
    """Take the numbers of ticks away that touch others: of two, the one that stands for more ends stays, else
    the one to the right.
    """
    labels = zip(places, axes.get_xticklabels(), strict=True)
    boxes = {number: label.get_window_extent().padded(2) for number, label in labels}
    kept: list[str] = []

    def last_to_yield(number: str) -> tuple[int, float]:
        place, ends = places[number]
        return -ends, -place

    for number in sorted(places, key=last_to_yield):
        if not any(boxes[number].overlaps(boxes[other]) for other in kept):
            kept.append(number)
    across = [place for place, _ in places.values()]
    axes.set_xticks(across, [number if number in kept else "" for number in places])
