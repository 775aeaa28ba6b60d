"""The picture of a suite: a panel for each group, a bar for each row, ours in colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outgrow.experiments.figure import GRID
from outgrow.experiments.suite.evaluate import Evaluated
from outgrow.experiments.suite.table import TableRow, columns_of, rows
from outgrow.train.suite.suite import Suite

PUBLISHED, OURS = "#B8BEC6", "#0072B2"


def draw(suite: Suite, evaluated: Sequence[Evaluated], path: Path) -> None:
    """Write the picture to `path`: the groups of which one of ours has a number. Beside scores on local items
    no published row is drawn: it measured others, and the longer bar would say nothing.
    """
    from matplotlib.figure import Figure

    columns, drawn = _columns_and_rows(suite, evaluated)
    names = [row.name for row in drawn]
    colours = [OURS if row.ours else PUBLISHED for row in drawn]
    heights = range(len(drawn))
    longest = max(map(len, names))
    width = 0.09 * longest + 2.1 * len(columns)  # inches
    height = 0.9 + 0.34 * len(drawn)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels: Any = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        values = [row.values[column] for row in drawn]
        lengths = [value or 0.0 for value in values]
        axes.barh(heights, lengths, color=colours, height=0.68)
        for row, value in enumerate(values):
            label = "–" if value is None else f"{value:.1f}"
            beside = lengths[row] + 1.5
            axes.text(beside, row, label, va="center", fontsize=8)
        axes.set(title=column, xlim=(0, 100), xlabel="%")
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(heights, names)
    limits = {each.limit for each in evaluated if each.limit is not None}
    if limits:
        figure.supxlabel(f"ours: the first {max(limits)} items of each benchmark", fontsize=8)
    figure.savefig(path, dpi=150, facecolor="white")


def _columns_and_rows(suite: Suite, evaluated: Sequence[Evaluated]) -> tuple[list[str], list[TableRow]]:
    """The groups to draw and the rows in which one of them has a number, ours in any case, the first on
    top."""
    with_group = [each for each in evaluated if _has_group(each)]
    local = any(each.local for each in with_group)
    listed = rows(suite, evaluated, groups=True)
    eligible = [row for row in listed if row.ours or not local]
    deciding = [row for row in eligible if row.ours or not with_group]
    columns = [name for name in columns_of(suite, groups=True) if _have_one(deciding, name)]
    drawn = [row for row in eligible if row.ours or any(_have_one([row], name) for name in columns)]
    return columns, drawn[::-1]


def _have_one(some: Sequence[TableRow], column: str) -> bool:
    """Check for a number in a column of some rows."""
    return any(row.values[column] is not None for row in some)


def _has_group(evaluated: Evaluated) -> bool:
    """Check for a checkpoint of which a group was measured in full."""
    return any(score is not None for score in evaluated.groups.values())
