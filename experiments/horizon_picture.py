"""The picture of a study's horizons: decayed ends against scratch's curve, and what each is worth."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.experiments.figure import GRID, INK
from outgrow.experiments.horizon_answer import answer, least_speedup, speedup_text
from outgrow.experiments.horizons import Worth
from outgrow.experiments.runs import SCRATCH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"adamw": "o", "muon": "s", "adamw_8bit": "^"}
DASHES = {"adamw": (0, (3, 2))}
LINE = 14  # points from one label to the next
ASIDE = 14  # points from an end to its label
TITLE_LETTERS = 94  # that the picture is wide enough for
FEW = 6  # lines whose names stand at their ends
# of the legend, where the names do not stand at the ends: a name takes so much beside its letters
WIDTH_INCHES, MOST_COLUMNS, ROW_INCHES = 10, 5, 0.19
NAME_INCHES, LETTER_INCHES = 0.6, 0.065
# scratch is black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8B5A2B", "#6A3D9A", "#999999")
FILLS = (
    "full",
    "none",
    "top",
)  # of the markers of the first arms of these colours, the next, and those after


def draw(rows: Sequence[Worth], path: Path) -> None:
    """Write the picture: where each arm's decayed ends lie against scratch's curve, and what they are
    worth."""
    figure = build(rows)
    figure.savefig(path, dpi=150, facecolor="white")


def build(rows: Sequence[Worth]) -> Figure:
    """The figure itself, without any state of pyplot."""
    from matplotlib.figure import Figure

    by_line = _by_line(rows)
    # the arms' names stand at their ends, as far as there is room for them
    named_at_ends = len(by_line) <= FEW
    columns = _columns(by_line)
    legend_rows = 0 if named_at_ends else math.ceil(len(by_line) / columns)
    figure = Figure(figsize=(WIDTH_INCHES, 5.0 + ROW_INCHES * legend_rows), layout="constrained")
    losses, speedups = figure.subplots(1, 2)
    looks = _looks([arm for arm, _ in by_line])
    at_losses: list[Label] = []
    at_speedups: list[Label] = []
    for (arm, optimizer), line in by_line.items():
        style = _style(arm, optimizer, looks[arm])
        label = _plot_losses(losses, line, style)
        at_losses.append(label)
        if arm != SCRATCH:
            at_speedups += _plot_speedups(speedups, line, style)
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
    _set_ticks(losses, speedups, rows)
    for axes in (losses, speedups):
        axes.minorticks_off()
        axes.margins(x=0.22 if named_at_ends else 0.05, y=0.12)
    if named_at_ends:
        _name(losses, at_losses)
        _name(speedups, at_speedups)
    else:
        handles, names = losses.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    title = _wrapped(answer(rows))
    figure.suptitle(title, fontsize=11.5, fontweight="bold", color=INK, x=0.01, ha="left")
    return figure


def _columns(by_line: Iterable[tuple[str, str]]) -> int:
    """The number of columns that the longest name leaves room for."""
    letters = max(len(f"{arm}, {optimizer}") for arm, optimizer in by_line)
    of_name = NAME_INCHES + LETTER_INCHES * letters
    return min(MOST_COLUMNS, max(1, int(WIDTH_INCHES / of_name)))


def _by_line(rows: Sequence[Worth]) -> dict[tuple[str, str], list[Worth]]:
    """The ends of each line, (arm, optimizer), in the order of their tokens; lines by name."""
    lines: dict[tuple[str, str], list[Worth]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.point.tokens):
        point = row.point
        lines[point.arm, point.optimizer].append(row)
    return dict(sorted(lines.items()))


def _style(arm: str, optimizer: str, look: tuple[str, str]) -> dict[str, Any]:
    """How a line is drawn: colour and fill tell the arm, dashes and the markers' shape the optimizer."""
    colour, fill = look
    return {
        "color": colour,
        "fillstyle": fill,
        "markerfacecoloralt": "white",
        "label": f"{arm}, {optimizer}",
        "linestyle": DASHES.get(optimizer, "-"),
        "marker": MARKERS.get(optimizer, "o"),
        "linewidth": 2.6 if arm == SCRATCH else 1.4,
        "markersize": 7,
        "markeredgecolor": "white" if fill == "full" else colour,
        "zorder": 4,
    }


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


def _set_ticks(losses: Axes, speedups: Axes, rows: Sequence[Worth]) -> None:
    """Put ticks where ends are: at the costs of scratch's, at the tokens a parameter of the others'."""
    scratch = [row.point for row in rows if row.point.arm == SCRATCH]
    costs = {round(point.paid / 1e12, 2) for point in scratch}
    at_costs = sorted(costs)
    losses.set_xticks(at_costs, [f"{cost:g}" for cost in at_costs])
    in_range = [row.point for row in rows if row.speedup_included is not None]
    others = [point for point in in_range if point.arm != SCRATCH]
    per_parameter = {round(point.tokens_per_parameter) for point in others}
    at_tokens = sorted(per_parameter)
    speedups.set_xticks(at_tokens, list(map(str, at_tokens)))


def _wrapped(sentence: str) -> str:
    """Wrap a sentence to the picture's width, in lines of about the same length."""
    lines = math.ceil(len(sentence) / TITLE_LETTERS)
    even = len(sentence) // lines + 12
    letters = min(TITLE_LETTERS, even)
    return "\n".join(textwrap.wrap(sentence, letters))


@dataclass(frozen=True)
class Label:
    """A text beside a point of the data."""

    across: float
    up: float
    text: str
    colour: str
    aligned: str = "left"  # at its left end, which is then beside the point


def _looks(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a fill of the markers for each arm; scratch is black. When COLOURS are used up, they come
    again with the next of FILLS.
    """
    pairs = itertools.product(FILLS, COLOURS)
    spare = itertools.cycle(pairs)
    looks = {SCRATCH: ("#000000", "full")}
    for arm in arms:
        if arm not in looks:
            fill, colour = next(spare)
            looks[arm] = (colour, fill)
    return looks


def _plot_losses(axes: Axes, rows: Sequence[Worth], style: dict[str, Any]) -> Label:
    """Draw the ends of one line against what they cost; return its name, for the last of them."""
    points = [row.point for row in rows]
    costs = [point.paid / 1e12 for point in points]
    losses = [point.val_loss for point in points]
    axes.plot(costs, losses, **style)
    # what is cheaper than scratch lies left of its line: the name does too, and leaves the line free
    is_scratch = points[-1].arm == SCRATCH
    side = "left" if is_scratch else "right"
    title = _title(rows[-1])
    return Label(costs[-1], losses[-1], title, style["color"], side)


def _plot_speedups(axes: Axes, rows: Sequence[Worth], style: dict[str, Any]) -> list[Label]:
    """Draw the speed-ups of one line against tokens a parameter, as far as they are known; return its name,
    for the last of them.
    """
    known = [row for row in rows if row.speedup_included is not None]
    across = [row.point.tokens_per_parameter for row in known]
    up = [row.speedup_included or 0.0 for row in known]
    bars = [row.interval_included or 0.0 for row in known]
    axes.errorbar(across, up, yerr=bars, capsize=3, **style)
    if not known:
        return []
    arm = known[-1].point.arm
    label = Label(across[-1], up[-1], arm, style["color"])
    return [label]


def _title(row: Worth) -> str:
    """An arm's name, and what its end is worth at least, where that is known."""
    arm = row.point.arm
    if arm == SCRATCH or not least_speedup(row):
        return arm
    sign = "" if row.speedup_included is None else "= "
    speedup = speedup_text(row.speedup_included, row.bound_included)
    return f"{arm}, S {sign}{speedup}"


def _name(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each text beside its point, those above one another LINE points apart, none below the axes; from
    each a thin line leads to its point, which may be hidden under others.
    """
    axes.autoscale_view()
    bottom, top = axes.get_ylim()
    inches = axes.bbox.height / axes.figure.dpi
    points_a_unit = inches * 72 / (top - bottom)
    ordered = sorted(labels, key=lambda label: -label.up)
    levels = [(label.up - bottom) * points_a_unit for label in ordered]
    for label, level, height in zip(ordered, levels, _apart(levels), strict=True):
        is_right = label.aligned == "left"
        aside = ASIDE if is_right else -ASIDE
        axes.annotate(
            label.text,
            (label.across, label.up),
            xytext=(aside, height - level),
            textcoords="offset points",
            ha=label.aligned,
            va="center",
            fontsize=9,
            color=label.colour,
            fontweight="bold",
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "linewidth": 1.0,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0 if is_right else 1, 0.5),
            },
        )


def _apart(levels: Sequence[float]) -> list[float]:
    """Heights LINE points apart or more, near falling `levels` over the bottom, below which none stands."""
    heights: list[float] = []
    below = math.inf
    for level in levels:
        below = min(level, below - LINE)
        heights.append(below)
    above = LINE / 2
    for place in reversed(range(len(heights))):
        heights[place] = max(heights[place], above)
        above = heights[place] + LINE
    return heights


def _finish(axes: Axes, across: str, up: str, title: str) -> None:
    limits = axes.dataLim
    if 0 < limits.x0 < limits.x1:
        axes.set_xscale("log")
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
