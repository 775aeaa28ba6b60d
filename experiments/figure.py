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

from outgrow.experiments.compare import Comparison, Row, answer, grown, percent
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
    panels = {"excluded": main, "tokens": tokens, "included": included}
    for kind, axes in panels.items():
        _panel(axes, comparison, kind, colours)

    _finish(main, "FLOPs of training, source excluded", "What it costs when the source is already there", 12)
    _finish(tokens, "tokens trained", "The same, against tokens", 10.5)
    heading = ["Each curve begins after its source's cost"]
    unpaid = [_shortened(arm, 24) for arm in _unpaid(comparison)]
    if unpaid:
        left_out = f"(unknown, so not drawn: {', '.join(unpaid)})"
        heading += textwrap.wrap(left_out, 62, break_on_hyphens=False)
    _finish(included, "FLOPs, source included", "\n".join(heading), 10.5)
    main.set_ylabel("validation loss, nats/token", color=INK)
    tokens.set_ylabel("nats/token", color=INK)
    _label_curves(main, comparison, colours)
    _mark_saving(main, comparison, colours)

    at_left: dict[str, Any] = {"x": 0.01, "ha": "left"}
    title = _title(answer(comparison))
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, **at_left)
    caption = textwrap.wrap(_caption(comparison), 150)
    figure.supxlabel("\n".join(caption), fontsize=8.5, color="#666666", **at_left)
    return figure


def _title(finding: str) -> str:
    """The finding in lines: what stands in brackets on its own, where every line then fits."""
    sentence = capital(finding)
    lines = sentence.replace(" (", "\n(").split("\n")
    if max(map(len, lines)) > 84:
        lines = textwrap.wrap(sentence, 84)
    return "\n".join(lines)


def colours_of(arms: Sequence[str]) -> dict[str, str]:
    """One colour for each arm: its own, or for an arm without one the next spare colour that is not taken."""
    chosen = {arm: COLOURS[arm] for arm in arms if arm in COLOURS}
    own = set(chosen.values())
    spare = itertools.cycle([colour for colour in SPARE if colour not in own])
    for arm in sorted(set(arms) - set(chosen)):
        chosen[arm] = next(spare)
    return chosen


def loss_range(comparison: Comparison) -> tuple[float, float]:
    """The losses worth seeing: from below the best end to where the informed arms start, without scratch's
    first fall.
    """
    losses: list[float] = []
    uninformed = 1.25 * comparison.scratch.final_loss
    for row in comparison.best_rows:
        curve = _curve(comparison, row)
        losses += _losses_after(curve, 0.25)
        peak = max(curve.losses)
        if peak < uninformed:
            losses.append(peak)
    highest = max(losses)
    lowest = min(map(_lowest, _best_runs(comparison)))
    margin = 0.06 * (highest - lowest)
    return lowest - margin, highest + margin


def _lowest(run: Run) -> float:
    return min(run.curve.losses)


def _curve(comparison: Comparison, row: Row) -> Curve:
    """The mean curve of a row."""
    return comparison.curves[row.arm, row.learning_rate]


def _best_runs(comparison: Comparison) -> list[Run]:
    """The runs of every arm at its best learning rate."""
    runs: list[Run] = []
    for row in comparison.best_rows:
        runs += comparison.runs_of(row)
    return runs


def _losses_after(curve: Curve, share: float) -> list[float]:
    """The losses after a share of a curve's FLOPs."""
    begin = share * curve.flops[-1]
    points = zip(curve.flops, curve.losses, strict=True)
    return [loss for flops, loss in points if flops >= begin]


def _panel(axes: Axes, comparison: Comparison, kind: str, colours: dict[str, str]) -> None:
    """Draw the curves of every arm against `kind`, those of its seeds behind their mean."""
    unpaid = _unpaid(comparison) if kind == "included" else []
    for row in reversed(comparison.best_rows):
        if row.arm in unpaid:
            continue
        style: dict[str, Any] = {"color": colours[row.arm], "solid_capstyle": "round"}
        style["linestyle"] = DASHES.get(row.arm, "-")
        seed = style | {"linewidth": 0.7, "alpha": 0.45, "zorder": 2}
        runs = comparison.runs_of(row)
        for run in runs if len(runs) > 1 else ():
            positions = _positions(run.curve, row, kind)
            axes.plot(positions, run.curve.losses, **seed)
        mean = _curve(comparison, row)
        positions = _positions(mean, row, kind)
        width = 2.6 if kind == "excluded" else 1.9
        axes.plot(positions, mean.losses, linewidth=width, zorder=3, **style)
    level = comparison.scratch.final_loss
    dashes = (0, (5, 3))
    axes.axhline(level, color="#000000", linewidth=1, linestyle=dashes, zorder=1)
    axes.set_ylim(*loss_range(comparison))
    axes.set_xlim(left=0)


def _unpaid(comparison: Comparison) -> list[str]:
    """The arms whose source cost nobody knows how much: where their curves would begin is not known
    either."""
    unpaid = [row for row in comparison.best_rows if row.source_flops is None]
    return sorted(row.arm for row in unpaid)


def _cut_off(comparison: Comparison) -> bool:
    """Check whether any loss lies above the frame."""
    _, highest = loss_range(comparison)
    runs = _best_runs(comparison)
    return any(max(run.curve.losses) > highest for run in runs)


def _shortened(name: str, room: int) -> str:
    """A name, of a long one its beginning and end."""
    if len(name) <= room:
        return name
    half = room // 2
    begin = name[:half]
    end = name[half + 1 - room :]
    return f"{begin}…{end}"


def _label(row: Row, width: int = 28) -> str:
    """An arm's name in at most two lines, broken after what parts its words, and its final loss."""
    name = _shortened(row.arm, 2 * width - 12)
    lines: list[str] = []
    line = ""
    for word in re.findall(r"[^-_+,. ]{1,22}[-_+,. ]*|[-_+,. ]+", name):
        if line and len(line) + len(word) > width:
            lines.append(line)
            line = ""
        line += word
    lines.append(f"{line} {row.final_loss:.3f}")
    return "\n".join(lines)


def _positions(curve: Curve, row: Row, kind: str) -> list[float]:
    """A curve's positions on the axis of a panel: tokens, or FLOPs after those of operator and source."""
    if kind == "tokens":
        return list(curve.tokens)
    source_flops = row.source_flops or 0.0
    shift = row.operator_flops + (source_flops if kind == "included" else 0.0)
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
    rows = sorted(comparison.best_rows, key=lambda row: row.final_loss)
    ends = [row.flops + row.operator_flops for row in rows]
    right = max(ends)
    labels = [_label(row) for row in rows]
    gap = 0.058 * (high - low)
    heights = _heights(rows, labels, gap)
    lowest = low + gap / 2
    lift = max(0.0, lowest - heights[0])  # the lowest stays off the axis
    heights = [height + lift for height in heights]
    axes.set_xlim(0, right)
    drawn = zip(rows, ends, labels, heights, strict=True)
    for row, end, label, height in drawn:
        colour = colours[row.arm]
        across = [end, right * 1.018]
        up = [row.final_loss, height]
        axes.plot(across, up, color=colour, linewidth=0.8, clip_on=False)
        beside = right * 1.023
        axes.text(beside, height, label, color=colour, va="center", **LABEL)
    level = comparison.scratch.final_loss
    axes.text(
        0.006,
        level - 0.012 * (high - low),
        f"scratch's final loss, {level:.3f}",
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
    middles = []
    for count in counts:
        own = list(itertools.islice(lines, count))
        middles.append(_middle(own))
    return middles


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed to lie at least `gap` apart, around the same middle."""
    clusters: list[list[float]] = []  # of heights that touch, each laid out around its own mean
    for height in heights:
        cluster = [height]
        while clusters and _touch(clusters[-1], cluster, gap):
            cluster = clusters.pop() + cluster
        clusters.append(cluster)
    spread_out = []
    for cluster in clusters:
        middle = _middle(cluster)
        half = (len(cluster) - 1) / 2
        offsets = [gap * (i - half) for i in range(len(cluster))]
        spread_out += [middle + offset for offset in offsets]
    return spread_out


def _touch(lower: Sequence[float], upper: Sequence[float], gap: float) -> bool:
    """Check whether two clusters of lines overlap when laid out around their middles."""
    distance = _middle(upper) - _middle(lower)
    lines = len(upper) + len(lower)
    return distance < gap * lines / 2


def _middle(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mark_saving(axes: Axes, comparison: Comparison, colours: dict[str, str]) -> None:
    """An arrow from scratch's end to where the cheapest grown arm reached the same loss."""
    arms = grown(comparison.best_rows)
    rows = [row for row in arms if row.cost.outcome == "reached"]
    scratch = comparison.scratch_curve
    level = comparison.scratch.final_loss
    end = reach(scratch.flops, scratch.losses, level)
    if not rows or end is None:
        return
    row = max(rows, key=lambda row: row.cost.speedup_excluded or 0.0)
    flops = row.cost.flops_excluded or 0.0
    colour = colours[row.arm]
    marker: dict[str, Any] = {"marker": "o", "markersize": 9, "markeredgecolor": "white"}
    axes.plot([flops], [level], color=colour, zorder=5, **marker)
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.2}
    tip = (flops, level)
    tail = (end, level)
    axes.annotate("", tip, tail, arrowprops=arrow, zorder=4)
    label = f"{percent(row.cost.saving_excluded or 0.0)} FLOPs"
    style: dict[str, Any] = {"textcoords": "offset points", "color": colour, "bbox": PAPER}
    style |= LABEL
    if flops > 0.5 * end:  # left of the marker, where that leaves the words on scratch's line free
        below = (-8, -7)
        axes.annotate(label, tip, below, ha="right", va="top", **style)
    else:  # above the arrow
        middle = ((flops + end) / 2, level)
        axes.annotate(label, middle, (0, 5), ha="center", va="bottom", **style)


def _caption(comparison: Comparison) -> str:
    counts = [row.n for row in comparison.best_rows]
    least = min(counts)
    most = max(counts)
    seeds = f"{least}–{most}"
    if least == most:
        seeds = f"{least}"
    thin = "thin: each seed, thick: their mean" if most > 1 else "one seed: no interval"
    cut = "; cut off above the frame" if _cut_off(comparison) else ""
    return (
        f"study {comparison.study}; n = {seeds}, {thin}; each arm at its best learning rate{cut}. "
        f"{comparison.machine}"
    )
