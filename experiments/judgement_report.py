"""The report on a judgement: the table of losses on each text, the picture, and the record of both."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from outgrow.experiments.cost import half_interval, verdict
from outgrow.experiments.figure import GRID, INK, SPARE
from outgrow.experiments.judgement import Judged, Judgement
from outgrow.experiments.table import markdown_table, signed
from outgrow.model.base.files import telling_disk_faults

RECORD, PICTURE = "results.json", "losses.png"
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00", *SPARE)


def write(judgement: Judgement, out: Path) -> str:
    """Write record and picture into `out`; return the table.

    Raises:
        UserError: the disk is full, or `out` cannot be written.
    """
    with telling_disk_faults(out):
        out.mkdir(parents=True, exist_ok=True)
        record = json.dumps(asdict(judgement), indent=1)
        (out / RECORD).write_text(f"{record}\n", encoding="utf-8")
        draw(judgement.arms, out / PICTURE)
    return markdown(judgement)


def markdown(judgement: Judgement) -> str:
    """The answer, the table, and the method in a sentence."""
    baseline, *others = judgement.arms
    texts = judgement.texts
    changes = len(others) * len(texts)
    header = ["arm", "tokens read"]
    header += [f"{text}: loss (95 %), change" for text in texts]
    cells = [_cells(judgement, judged) for judged in judgement.arms]
    table = markdown_table(header, cells)
    lines = [
        f"Against `{baseline.arm}`, at equal tokens:",
        "",
        *(_sentence(judgement, judged) for judged in others),
        "",
        table,
        "",
        (
            f"Losses in nats/token on held-out documents, {judgement.eval_tokens:,} tokens of each text; "
            f"{len(judgement.seeds)} seeds; 95 %, Student's t over seeds, those of changes over pairs of one "
            f"seed, not corrected for the {changes} changes that are looked at. "
            f"Machine: {judgement.machine}."
        ),
    ]
    return "\n".join(lines) + "\n"


def _sentence(judgement: Judgement, judged: Judged) -> str:
    parts = []
    for text in judgement.texts:
        difference, interval = judgement.change(judged, text)
        size = signed(difference) + _plus_minus(interval)
        words = verdict(difference, interval)
        parts.append(f"{text} {size} ({words})")
    return f"- `{judged.arm}`: " + ", ".join(parts)


def _cells(judgement: Judgement, judged: Judged) -> list[str]:
    counts = [f"{name} {count:,}" for name, count in judged.tokens.items()]
    read = ", ".join(counts)
    cells = [judged.arm, read]
    is_baseline = judged is judgement.arms[0]
    for text in judgement.texts:
        losses = judged.losses[text]
        interval = _plus_minus(half_interval(losses))
        own = f"{fmean(losses):.3f}{interval}"
        difference, _ = judgement.change(judged, text)
        cells.append(own if is_baseline else f"{own}, {signed(difference)}")
    return cells


def _plus_minus(interval: float | None) -> str:
    return "" if interval is None else f" ± {interval:.3f}"


# ---- the picture -------------------------------------------------------------------------------------------


def draw(arms: Sequence[Judged], path: Path) -> None:
    """Draw the loss on the runs' own text as it falls, and the final losses on each text, every seed a
    point.
    """
    from matplotlib.figure import Figure

    texts = list(arms[0].losses)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    widths = [1.8] + [1.0] * len(texts)
    panels: Any = figure.subplots(1, len(widths), width_ratios=widths)
    falling, *finals = panels
    colours = itertools.cycle(COLOURS)
    coloured = list(zip(arms, colours, strict=False))
    for judged, colour in coloured:
        _draw_curves(falling, judged, colour)
    falling.set(
        xlabel="tokens trained",
        ylabel="nats/token",
        title=f"{texts[0]}, held out",
        ylim=_range(arms),
    )
    falling.xaxis.set_major_formatter("{x:,.0f}")
    falling.legend(frameon=False, labelcolor=INK)
    names = [judged.arm for judged in arms]
    for text, axes in zip(texts, finals, strict=True):
        for column, (judged, colour) in enumerate(coloured):
            _draw_ends(axes, column, judged.losses[text], colour)
        axes.set_xticks(range(len(arms)), names, rotation=40, ha="right")
        axes.set_title(f"final, {text}")
    for axes in panels:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, facecolor="white")


def _draw_curves(axes: Any, judged: Judged, colour: str) -> None:
    """Draw an arm's loss against tokens: every seed thin, their mean thick."""
    losses = []  # of each seed
    for curve in judged.curves:
        tokens, own = zip(*curve, strict=True)
        axes.plot(tokens, own, color=colour, linewidth=0.8, alpha=0.35)
        losses.append(own)
    first = judged.curves[0]
    tokens, _ = zip(*first, strict=True)
    columns = zip(*losses, strict=True)
    means = list(map(fmean, columns))
    axes.plot(tokens, means, color=colour, linewidth=1.8, label=judged.arm)


def _draw_ends(axes: Any, column: int, losses: Sequence[float], colour: str) -> None:
    """Draw an arm's final losses in its column: every seed a point, their mean a line."""
    across = [column] * len(losses)
    axes.plot(across, losses, "o", color=colour, markersize=4, alpha=0.7)
    left = column - 0.3
    right = column + 0.3
    mean = fmean(losses)
    axes.hlines(mean, left, right, color=colour, linewidth=2)


def _range(arms: Sequence[Judged]) -> tuple[float, float]:
    """The range from below the lowest loss to where the curves have come together: the start would flatten
    the rest.
    """
    losses: list[float] = []
    for judged in arms:
        for curve in judged.curves:
            late = curve[2:] or curve[-1:]
            losses += [loss for _, loss in late]
    return min(losses) - 0.05, max(losses) + 0.05
