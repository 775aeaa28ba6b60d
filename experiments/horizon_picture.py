"""The picture of a study's horizons: decayed ends against scratch's curve, and what each is worth.

A few lines stand out and bear their names: scratch, the control, the arm of the headline, and the grown arms
that are worth most. The others are grey; their names and numbers are in the table. Costs are counted one way,
with the source's training or without it, as the study's question asks.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.experiments.figure import GRID, INK
from outgrow.experiments.horizon_answer import headline, is_control, is_grown, speedup_text
from outgrow.experiments.horizon_reading import Line, Reading, by_line, line_of, lines_that_answer
from outgrow.experiments.horizons import Speedup, Worth
from outgrow.experiments.labels import Label, write_names
from outgrow.experiments.runs import SCRATCH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"adamw": "o", "muon": "s", "adamw_8bit": "^"}
DASHES = {"adamw": (0, (3, 2))}
TITLE_LETTERS = 94  # that the picture is wide enough for
WIDTH_INCHES, HEIGHT_INCHES = 10, 5.2
BEFORE, AFTER = 0.1, 0.45  # of the width of what is drawn: the room to its left and right
STEEP = 3.0  # the largest speed-up by the least, from which on the axis is logarithmic
SPEEDUPS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10)  # marked on such an axis
BLACK, GREY = "#000000", "#C4C4C4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#6A3D9A")

Style = dict[str, Any]


def draw(rows: Sequence[Worth], path: Path, *, source_paid: bool = True) -> None:
    """Write the picture: where each arm's decayed ends lie against scratch's curve, and what they are worth.

    Args:
        source_paid: the source's training is counted; else it is left out.
    """
    figure = build(rows, source_paid=source_paid)
    figure.savefig(path, dpi=150, facecolor="white")


def build(rows: Sequence[Worth], *, source_paid: bool = True) -> Figure:
    """The figure itself, without any state of pyplot."""
    from matplotlib.figure import Figure

    reading = Reading(rows, source_paid)
    lines = by_line(rows)
    outstanding = lines_that_answer(reading, lines)
    styles = _styles(lines, outstanding)
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    losses, speedups = figure.subplots(1, 2)
    at_losses: list[Label] = []
    at_speedups: list[Label] = []
    for line, ends in lines.items():
        name = _name_of(line, outstanding, reading)
        label = _plot_losses(losses, reading, ends, styles[line], name)
        labels = [] if line[0] == SCRATCH else _plot_speedups(speedups, reading, ends, styles[line], name)
        if line in outstanding:
            at_losses.append(label)
            at_speedups += labels
    _mark_scratch(speedups)
    way = "included" if source_paid else "excluded"
    _finish(
        losses,
        f"TFLOP, the source {way}",
        "validation loss, nats/token",
        "Decayed ends: below scratch's line is cheaper than scratch",
    )
    _finish(
        speedups,
        "tokens a parameter (the control: scratch's at equal FLOPs)",
        "S: scratch's FLOPs / own, at equal loss",
        "What each end is worth: above 1 is cheaper",
    )
    _scale_speedups(speedups)
    for axes in (losses, speedups):
        _leave_room(axes)
    _legend(figure, reading, lines, outstanding)
    title = _wrapped(headline(rows, source_paid=source_paid))
    figure.suptitle(title, fontsize=11.5, fontweight="bold", color=INK, x=0.01, ha="left")
    at_costs, at_tokens = _places(reading)
    _set_ticks(losses, at_costs)
    _set_ticks(speedups, at_tokens)
    figure.draw_without_rendering()  # only then are the sizes known on which the texts' places depend
    for axes, places, labels in ((losses, at_costs, at_losses), (speedups, at_tokens, at_speedups)):
        _thin(axes, places)
        write_names(axes, labels, passed_over=GREY)
    return figure


# ---- which lines, and how they look ------------------------------------------------------------------------


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
        "linewidth": 2.6 if arm == SCRATCH else 0.8 if is_grey else 1.8,
        "markersize": 3 if is_grey else 7,
        "zorder": 2 if is_grey else 4,
    }


# ---- the panels --------------------------------------------------------------------------------------------


def _plot_losses(axes: Axes, reading: Reading, rows: Sequence[Worth], style: Style, name: str) -> Label:
    """Draw the ends of one line against what they cost; return its name, for the last of them."""
    costs = list(map(reading.teraflop, rows))
    losses = [row.point.val_loss for row in rows]
    axes.plot(costs, losses, markeredgecolor="white", **style)
    # what is cheaper than scratch lies left of its line: the name does too, and leaves the line free
    last = rows[-1]
    side = "left" if last.point.arm == SCRATCH else "right"
    return Label(costs[-1], losses[-1], name, style["color"], side)


def _plot_speedups(
    axes: Axes, reading: Reading, rows: Sequence[Worth], style: Style, name: str
) -> list[Label]:
    """Draw the speed-ups of one line against tokens a parameter, as far as they are known, or what they are
    at least; return the name of its last end, and the values of all where it is the headline's.
    """
    measured = [row for row in rows if _is_drawn(reading.speedup(row))]
    if not measured:
        return []
    across = list(map(reading.horizon, measured))
    speedups = list(map(reading.speedup, measured))
    values = [speedup.least for speedup in speedups]
    is_grey = style["color"] == GREY
    axes.plot(across, values, **style | ({} if is_grey else {"marker": ""}))
    if not is_grey:
        for position, speedup in zip(across, speedups, strict=True):
            _plot_value(axes, position, speedup, style)
    names = [""] * len(measured)
    names[-1] = f"{name} "
    labels = [
        Label(position, speedup.least, f"{title}{speedup_text(speedup.value, speedup.bound)}", style["color"])
        for position, speedup, title in zip(across, speedups, names, strict=True)
    ]
    is_headline = reading.best in rows
    return labels if is_headline else labels[-1:]


def _plot_value(axes: Axes, position: float, speedup: Speedup, style: Style) -> None:
    """Draw one speed-up: filled and with a bar where it has an interval, else open, and as a triangle where
    it is known to be above.
    """
    is_open = speedup.half is None
    colour = style["color"]
    marker = {"marker": "^"} if speedup.value is None else {}
    axes.errorbar(
        [position],
        [speedup.least],
        yerr=None if is_open else [speedup.half or 0.0],
        capsize=3,
        markerfacecolor="white" if is_open else colour,
        markeredgecolor=colour if is_open else "white",
        **style | {"linestyle": "-"} | marker,
    )


def _is_drawn(speedup: Speedup) -> bool:
    """Check for a value or a lower bound; an upper one says too little to be drawn."""
    return speedup.value is not None or speedup.least > 0


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


def _legend(figure: Figure, reading: Reading, lines: dict[Line, list[Worth]], outstanding: set[Line]) -> None:
    """Explain what is drawn in more than one way: optimizers, open markers, grey lines."""
    from matplotlib.lines import Line2D

    keys: dict[str, Style] = {}
    optimizers = dict.fromkeys(optimizer for _, optimizer in lines)
    for optimizer in optimizers if len(optimizers) > 1 else ():
        keys[optimizer] = _style(("", optimizer), INK)
    coloured = [ends for line, ends in lines.items() if line in outstanding and line[0] != SCRATCH]
    worth = [row for ends in coloured for row in ends if reading.speedup(row).value is not None]
    without = {len(row.seeds) > 1 for row in worth if reading.speedup(row).half is None}
    reasons = {False: "one seed", True: "a seed's end lies outside of its scratch's curve"}
    if without:
        why = " or ".join(reasons[several] for several in sorted(without))
        keys[f"open: no interval ({why})"] = {
            "color": INK,
            "linestyle": "",
            "marker": "s",
            "markerfacecolor": "white",
        }
    drawn = [reading.speedup(row) for ends in coloured for row in ends]
    if any(speedup.value is None and _is_drawn(speedup) for speedup in drawn):
        keys["at least (its loss lies below scratch's curve)"] = {
            "color": INK,
            "linestyle": "",
            "marker": "^",
            "markerfacecolor": "white",
        }
    grey = len(lines) - len(outstanding)
    if grey:
        others = "1 other line" if grey == 1 else f"{grey} other lines"
        keys[f"{others}: see the table"] = {"color": GREY, "marker": "s", "markersize": 3}
    if keys:
        handles = [Line2D([], [], **style) for style in keys.values()]
        figure.legend(
            handles, list(keys), loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False
        )


def _wrapped(sentence: str) -> str:
    """Wrap a sentence to the picture's width, in lines of about the same length; what belongs to a number
    stays beside it.
    """
    text = re.sub(r"S ([=<>]) ", "S\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", sentence)
    text = re.sub(r"(\d) (TFLOP|nats)", "\\1\N{NO-BREAK SPACE}\\2", text)
    text = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    lines = math.ceil(len(text) / TITLE_LETTERS)
    even = len(text) // lines + 12
    letters = min(TITLE_LETTERS, even)
    return "\n".join(textwrap.wrap(text, letters))


def _name_of(line: Line, outstanding: set[Line], reading: Reading) -> str:
    """A line's name: its arm, and its optimizer where the arm stands out with another one too; the control
    is called so.
    """
    arm, optimizer = line
    several = sum(other == arm for other, _ in outstanding) > 1
    role = ", the control" if any(_controls(row, line, reading) for row in reading.rows) else ""
    return f"{arm}, {optimizer}{role}" if several else f"{arm}{role}"


def _controls(row: Worth, line: Line, reading: Reading) -> bool:
    return line_of(row) == line and is_control(row, reading.rows)


# the numbers of ticks, where each stands, and how many ends of grown arms or scratch stand there
Places = dict[str, tuple[float, int]]


def _places(reading: Reading) -> tuple[Places, Places]:
    """Where ends are: the costs of scratch's, the tokens a parameter of the others'."""
    costs: Places = {}
    tokens: Places = {}
    for row in reading.rows:
        if row.point.arm == SCRATCH:
            _add(costs, reading.teraflop(row), 2, 1)
        elif _is_drawn(reading.speedup(row)):
            _add(tokens, reading.horizon(row), 0, int(is_grown(row, reading.rows)))
    return costs, tokens


def _add(places: Places, position: float, digits: int, ends: int) -> None:
    """Count ends at a place; those of one number, rounded, share the first one's."""
    number = f"{round(position, digits):g}"
    first, before = places.get(number, (position, 0))
    places[number] = (first, before + ends)


def _set_ticks(axes: Axes, places: Places) -> None:
    across = [position for position, _ in places.values()]
    axes.set_xticks(across, list(places))


def _thin(axes: Axes, places: Places) -> None:
    """Take the numbers of ticks away that touch others: of two, the one that stands for more ends stays, else
    the one to the right.
    """
    labels = zip(places, axes.get_xticklabels(), strict=True)
    boxes = {number: label.get_window_extent().padded(2) for number, label in labels}
    survivors: list[str] = []

    def last_to_yield(number: str) -> tuple[int, float]:
        position, ends = places[number]
        return -ends, -position

    for number in sorted(places, key=last_to_yield):
        if not any(boxes[number].overlaps(boxes[other]) for other in survivors):
            survivors.append(number)
    across = [position for position, _ in places.values()]
    axes.set_xticks(across, [number if number in survivors else "" for number in places])
