"""The picture of a study of mixtures: the loss on the first text as it falls, and the final losses on each
text, every seed a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from outgrow.experiments.figure import GRID, INK, SPARE

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00", *SPARE)


@dataclass(frozen=True)
class Judged:
    """One arm: per seed its curve on the first text, and its final loss on each text, in nats/token."""

    arm: str
    tokens: dict[str, int]  # read of each source
    curves: tuple[tuple[tuple[float, float], ...], ...]  # per seed (tokens, loss)
    losses: dict[str, tuple[float, ...]]  # text → one for each seed
    bits_per_byte: dict[str, tuple[float, ...]]


def draw(arms: Sequence[Judged], path: Path) -> None:
    """Write the picture to `path`."""
    from matplotlib.figure import Figure

    texts = list(arms[0].losses)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    widths = [1.8] + [1.0] * len(texts)
    panels: Any = figure.subplots(1, len(widths), width_ratios=widths)
    for judged, colour in zip(arms, COLOURS, strict=False):
        for curve in judged.curves:
            panels[0].plot(*zip(*curve, strict=True), color=colour, linewidth=0.8, alpha=0.35)
        tokens = [tokens for tokens, _ in judged.curves[0]]
        columns = zip(*([loss for _, loss in curve] for curve in judged.curves), strict=True)
        means = list(map(fmean, columns))
        panels[0].plot(tokens, means, color=colour, linewidth=1.8, label=judged.arm)
    panels[0].set(
        xlabel="tokens trained",
        ylabel="nats/token",
        title=f"{texts[0]}, held out",
        ylim=_range(arms),
    )
    panels[0].xaxis.set_major_formatter("{x:,.0f}")
    panels[0].legend(frameon=False, labelcolor=INK)
    for text, axes in zip(texts, panels[1:], strict=True):
        for column, (judged, colour) in enumerate(zip(arms, COLOURS, strict=False)):
            losses = judged.losses[text]
            axes.plot([column] * len(losses), losses, "o", color=colour, markersize=4, alpha=0.7)
            axes.hlines(fmean(losses), column - 0.3, column + 0.3, color=colour, linewidth=2)
        axes.set_xticks(range(len(arms)), [judged.arm for judged in arms], rotation=40, ha="right")
        axes.set_title(f"final, {text}")
    for axes in panels:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, facecolor="white")


def _range(arms: Sequence[Judged]) -> tuple[float, float]:
    """The range from below the lowest loss to where the curves have come together: the start would flatten
    the rest.
    """
    curves = [curve for judged in arms for curve in judged.curves]
    losses = [loss for curve in curves for _, loss in (curve[2:] or curve[-1:])]
    return min(losses) - 0.05, max(losses) + 0.05
