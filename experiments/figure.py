"""The picture of a comparison: loss against FLOPs and tokens, every seed thin, the mean thick, scratch's
final loss as a line.

Three panels: what the arms cost when the source was already there (large, with the answer), the same against
tokens, and the same with every curve shifted right by what its source cost.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.experiments.compare import Comparison, Row, answer
from outgrow.experiments.cost import Curve, reach
from outgrow.experiments.runs import SCRATCH, SOURCE, Run
from outgrow.experiments.table import capital

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, readable with any colour vision; an arm keeps its colour from picture to picture.
COLOURS = {
    SCRATCH: "#000000",
    "lossless": "#0072B2",
    "tile": "#D55E00",
    "random_pad": "#E69F00",
    "lossless_stack": "#CC79A7",
    "lossless_proportional": "#56B4E9",
    "tile_flat": "#8B5A2B",
    SOURCE: "#009E73",
}
SPARE = ("#CC79A7", "#56B4E9", "#8B5A2B", "#999999", "#6A3D9A", "#B2A100")
DASHES = {SOURCE: (0, (4, 1.5))}  # the control arm is not one of the target's, and looks it
INK, GRID = "#333333", "#E4E4E4"
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
LABEL: dict[str, Any] = {"fontsize": 11, "fontweight": "bold"}


def draw(comparison: Comparison, path: Path) -> None:
    """Write the picture to `path` (its suffix says the format)."""
    figure = build(comparison)
    figure.savefig(path, dpi=150, facecolor="white")


def build(comparison: Comparison) -> Figure:
    """The figure itself: no window, no global state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.6), layout="constrained")
    # apart, so that the labels beside the one do not narrow the others
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.45, 1))
    above, below = parts
    main: Axes = above.subplots()
    tokens, included = below.subplots(1, 2)
    colours = colours_of([row.arm for row in comparison.best_rows])
    for axes, kind in ((main, "excluded"), (tokens, "tokens"), (included, "included")):
        _panel(axes, comparison, kind, colours)
    _finish(main, "FLOPs of training, source excluded", "What it costs when the source is already there", 12)
    _finish(tokens, "tokens trained", "The same, against tokens", 10.5)
    unknown = ", ".join(_shortened(arm, 24) for arm in _unpaid(comparison))
    left_out = (
        textwrap.wrap(f"(unknown, so not drawn: {unknown})", 62, break_on_hyphens=False) if unknown else []
    )
    _finish(
        included,
        "FLOPs, source included",
        "\n".join(["Each curve begins after its source's cost", *left_out]),
        10.5,
    )
    main.set_ylabel("validation loss, nats/token", color=INK)
    tokens.set_ylabel("nats/token", color=INK)
    _label_curves(main, comparison, colours)
    _mark_saving(main, comparison, colours)
    finding = capital(answer(comparison))
    parts = finding.replace(" (", "\n(").split("\n")
    short = max(map(len, parts)) <= 84
    title = "\n".join(parts if short else textwrap.wrap(finding, 84))
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, x=0.01, ha="left")
    figure.supxlabel(
        "\n".join(textwrap.wrap(_caption(comparison), 150)),
        fontsize=8.5,
        color="#666666",
        x=0.01,
        ha="left",
    )
    return figure


def colours_of(arms: Sequence[str]) -> dict[str, str]:
    """One colour for each arm: its own, or for an arm without one the next spare colour that is not taken."""
    chosen = {arm: COLOURS[arm] for arm in arms if arm in COLOURS}
    spare = [colour for colour in SPARE if colour not in chosen.values()]
    unknown = sorted(set(arms) - set(chosen))
    return chosen | dict(zip(unknown, itertools.cycle(spare), strict=False))


def loss_range(comparison: Comparison) -> tuple[float, float]:
    """The losses worth seeing: from below the best end to where the informed arms start, without scratch's
    first fall.
    """
    curves = [comparison.curves[row.arm, row.learning_rate] for row in comparison.best_rows]
    lowest = min(min(run.curve.losses) for run in _best_runs(comparison))
    late = [loss for curve in curves for loss in _losses_after(curve, 0.25)]
    peaks = [max(curve.losses) for curve in curves]
    informed = [loss for loss in peaks if loss < 1.25 * comparison.scratch.final_loss]
    highest = max(late + informed)
    margin = 0.06 * (highest - lowest)
    return lowest - margin, highest + margin


def _best_runs(comparison: Comparison) -> list[Run]:
    """The runs of every arm at its best learning rate."""
    return [run for row in comparison.best_rows for run in comparison.runs_of(row)]


def _losses_after(curve: Curve, share: float) -> list[float]:
    """The losses after a share of a curve's FLOPs."""
    begin = share * curve.flops[-1]
    return [loss for flops, loss in zip(curve.flops, curve.losses, strict=True) if flops >= begin]


def _panel(axes: Axes, comparison: Comparison, kind: str, colours: dict[str, str]) -> None:
    unknown = _unpaid(comparison) if kind == "included" else []
    for row in (row for row in reversed(comparison.best_rows) if row.arm not in unknown):
        style: dict[str, Any] = {"color": colours[row.arm], "linestyle": DASHES.get(row.arm, "-")}
        style["solid_capstyle"] = "round"
        runs = comparison.runs_of(row)
        for run in runs if len(runs) > 1 else ():
            positions = _positions(run.curve, row, kind)
            axes.plot(positions, run.curve.losses, linewidth=0.7, alpha=0.45, zorder=2, **style)
        mean = comparison.curves[row.arm, row.learning_rate]
        width = 2.6 if kind == "excluded" else 1.9
        axes.plot(_positions(mean, row, kind), mean.losses, linewidth=width, zorder=3, **style)
    axes.axhline(comparison.scratch.final_loss, color="#000000", linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    axes.set_ylim(*loss_range(comparison))
    axes.set_xlim(left=0)


def _unpaid(comparison: Comparison) -> list[str]:
    """The arms whose source cost nobody knows how much: where their curves would begin is not known
    either."""
    return sorted(row.arm for row in comparison.best_rows if row.source_flops is None)


def _cut_off(comparison: Comparison) -> bool:
    """True if any loss lies above the frame."""
    _, highest = loss_range(comparison)
    return any(max(run.curve.losses) > highest for run in _best_runs(comparison))


def _shortened(name: str, room: int) -> str:
    """A name, of a long one its beginning and end."""
    if len(name) <= room:
        return name
    half = room // 2
    return f"{name[:half]}…{name[half + 1 - room :]}"


def _label(row: Row, width: int = 28) -> str:
    """An arm's name in at most two lines, broken after what parts its words, and its final loss."""
    lines = [""]
    for word in re.findall(r"[^-_+,. ]{1,22}[-_+,. ]*|[-_+,. ]+", _shortened(row.arm, 2 * width - 12)):
        if lines[-1] and len(lines[-1] + word) > width:
            lines.append("")
        lines[-1] += word
    lines[-1] += f" {row.final_loss:.3f}"
    return "\n".join(lines)


def _positions(curve: Curve, row: Row, kind: str) -> list[float]:
    if kind == "tokens":
        return list(curve.tokens)
    shift = row.operator_flops + (row.source_flops or 0.0 if kind == "included" else 0.0)
    return [flops + shift for flops in curve.flops]


def _finish(axes: Axes, xlabel: str, title: str, size: float) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(xlabel, color=INK)
    axes.set_title(title, fontsize=size, loc="left", color=INK)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label_curves(axes: Axes, comparison: Comparison, colours: dict[str, str]) -> None:
    """Each arm's name and final loss at the end of its curve, pushed apart where they would overlap."""
    low, high = loss_range(comparison)
    end = max(row.flops + row.operator_flops for row in comparison.best_rows)
    rows = sorted(comparison.best_rows, key=lambda row: row.final_loss)
    labels, gap = [_label(row) for row in rows], 0.058 * (high - low)
    heights = _heights(rows, labels, gap)
    lift = max(0.0, low + gap / 2 - heights[0])  # the lowest stays off the axis
    heights = [height + lift for height in heights]
    axes.set_xlim(0, end)
    for row, label, height in zip(rows, labels, heights, strict=True):
        x = row.flops + row.operator_flops
        across, up = [x, end * 1.018], [row.final_loss, height]
        axes.plot(across, up, color=colours[row.arm], linewidth=0.8, clip_on=False)
        axes.text(end * 1.023, height, label, color=colours[row.arm], va="center", **LABEL)
    level, text = comparison.scratch.final_loss, f"scratch's final loss, {comparison.scratch.final_loss:.3f}"
    axes.text(
        0.006,
        level - 0.012 * (high - low),
        text,
        transform=axes.get_yaxis_transform(),
        fontsize=9.5,
        color=INK,
        va="top",
        zorder=4,
        bbox=PAPER,
    )


def _heights(rows: Sequence[Row], labels: Sequence[str], gap: float) -> list[float]:
    """The middle of each label, where every line of them has room: lines are spread, and a label is in the
    midst of its own.
    """
    counts = [label.count("\n") + 1 for label in labels]
    losses: list[float] = []
    for row, count in zip(rows, counts, strict=True):
        losses += [row.final_loss] * count
    lines = iter(spread(losses, gap))
    return [_middle(list(itertools.islice(lines, count))) for count in counts]


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed to lie at least `gap` apart, around the same middle."""
    placed: list[list[float]] = []  # clusters of heights that touch, each laid out around its own mean
    for height in heights:
        placed.append([height])
        while len(placed) > 1 and _touch(placed[-2], placed[-1], gap):
            last = placed.pop()
            placed[-1] += last
    spread_out = []
    for cluster in placed:
        middle, half = _middle(cluster), (len(cluster) - 1) / 2
        spread_out += [middle + gap * (i - half) for i in range(len(cluster))]
    return spread_out


def _touch(lower: Sequence[float], upper: Sequence[float], gap: float) -> bool:
    """True for two clusters of lines that overlap when laid out around their middles."""
    lines = len(upper) + len(lower)
    return _middle(upper) - _middle(lower) < gap * lines / 2


def _middle(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mark_saving(axes: Axes, comparison: Comparison, colours: dict[str, str]) -> None:
    """An arrow from scratch's end to where the cheapest grown arm reached the same loss."""
    grown = [row for row in comparison.best_rows if row.arm not in (SCRATCH, SOURCE)]
    rows = [row for row in grown if row.cost.outcome == "reached"]
    end = reach(
        comparison.scratch_curve.flops,
        comparison.scratch_curve.losses,
        comparison.scratch.final_loss,
    )
    if not rows or end is None:
        return
    row = max(rows, key=lambda row: row.cost.speedup_excluded or 0.0)
    x, level = row.cost.flops_excluded or 0.0, comparison.scratch.final_loss
    colour = colours[row.arm]
    axes.plot([x], [level], marker="o", markersize=9, color=colour, markeredgecolor="white", zorder=5)
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.2}
    axes.annotate("", (x, level), (end, level), arrowprops=arrow, zorder=4)
    saved = row.cost.saving_excluded or 0.0
    label = f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} FLOPs".replace("%", " %")
    style: dict[str, Any] = {"textcoords": "offset points", "color": colour, "bbox": PAPER, **LABEL}
    if x > 0.5 * end:  # left of the marker, where that leaves the words on scratch's line free
        axes.annotate(label, (x, level), (-8, -7), ha="right", va="top", **style)
    else:  # above the arrow
        middle = (x + end) / 2
        axes.annotate(label, (middle, level), (0, 5), ha="center", va="bottom", **style)


def _caption(comparison: Comparison) -> str:
    counts = sorted({row.n for row in comparison.best_rows})
    least, most = counts[0], counts[-1]
    seeds = f"{least}" if least == most else f"{least}–{most}"
    thin = "thin: each seed, thick: their mean" if counts[-1] > 1 else "one seed: no interval"
    cut = "; cut off above the frame" if _cut_off(comparison) else ""
    return (
        f"study {comparison.study}; n = {seeds}, {thin}; each arm at its best learning rate{cut}. "
        f"{comparison.machine}"
    )
