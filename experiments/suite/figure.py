"""The picture of a suite: a panel for each group, a bar for each row, ours in colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outgrow.experiments.figure import GRID
from outgrow.experiments.suite.evaluate import Evaluated
from outgrow.experiments.suite.table import columns_of, rows
from outgrow.train.suite.suite import Suite

PUBLISHED, OURS = "#B8BEC6", "#0072B2"


def draw(suite: Suite, found: Sequence[Evaluated], path: Path) -> None:
    """Write the picture to `path`. Beside scores on local items no published row is drawn: it measured
    others, and the longer bar would say nothing.
    """
    from matplotlib.figure import Figure

    local = any(each.local and any(score is not None for score in each.groups.values()) for each in found)
    told = [row for row in rows(suite, found, groups=True)[::-1] if row[2] or not local]
    columns = [
        name
        for name in columns_of(suite, groups=True)
        if any(values[name] is not None for _, values, _ in told)
    ]
    names = 0.09 * max(len(name) for name, _, _ in told)  # inches
    figure = Figure(figsize=(names + 2.1 * len(columns), 0.9 + 0.34 * len(told)), layout="constrained")
    panels: Any = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        values = [values[column] for _, values, _ in told]
        colours = [OURS if ours else PUBLISHED for _, _, ours in told]
        axes.barh(range(len(told)), [value or 0.0 for value in values], color=colours, height=0.68)
        for place, value in enumerate(values):
            axes.text(
                (value or 0.0) + 1.5, place, "–" if value is None else f"{value:.1f}", va="center", fontsize=8
            )
        axes.set(title=column, xlim=(0, 100), xlabel="%")
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(told)), [name for name, _, _ in told])
    figure.savefig(path, dpi=150, facecolor="white")
