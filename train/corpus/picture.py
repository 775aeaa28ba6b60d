"""The picture of an inspection: shares, lengths, filter scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.model.base.files import whole_file
from outgrow.train.corpus.inspect import LENGTHS, SCORES, Source, used_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, readable with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#000000")
INK, GRID, GONE = "#333333", "#E4E4E4", "#BBBBBB"


def draw(sources: Sequence[Source], path: Path) -> None:
    """Write the picture to `path`, a png."""
    from matplotlib.figure import Figure

    coloured = zip(sources, cycle(COLOURS), strict=False)
    scored = [(source, colour) for source, colour in coloured if source.scored]
    bars = 0.25 * len(sources)  # inches
    histograms = 2.2 * len(scored)
    height = 3.6 + bars + histograms
    figure = Figure(figsize=(10, height), layout="constrained")
    rows: Any = figure.subfigures(
        1 + len(scored), 1, height_ratios=[1.3 + 0.1 * len(sources), *[1] * len(scored)], squeeze=False
    )
    shares, lengths = rows[0, 0].subplots(1, 2)
    _shares(shares, sources)
    _lengths(lengths, sources)
    panels = rows[1:, 0]
    for part, (source, colour) in zip(panels, scored, strict=True):
        _scores(part.subplots(), source, colour)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150, facecolor="white")


def _shares(axes: Axes, sources: Sequence[Source]) -> None:
    counts = [source.total("tokens") for source in sources]
    tokens = np.array(counts, float)
    places = np.arange(len(sources))[::-1]
    axes.barh(
        places,
        100 * tokens / tokens.sum(),
        color=[COLOURS[i % len(COLOURS)] for i in range(len(sources))],
        height=0.65,
    )
    for height, count in zip(places, tokens, strict=True):
        axes.text(
            100 * count / tokens.sum() + 1,
            height,
            f"{_short(count)} tokens",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks(places, [source.name for source in sources])
    axes.set_xlim(0, 130)
    axes.set_xticks(range(0, 101, 25))
    top = max(1.6, len(sources) - 0.4)
    axes.set_ylim(-0.6, top)
    _finish(axes, "% of all tokens", "What there is of each source")


def _lengths(axes: Axes, sources: Sequence[Source]) -> None:
    first, last = used_bins(sources)
    for source, colour in zip(sources, cycle(COLOURS), strict=False):
        count = max(1, source.lengths.sum())
        shares = 100 * source.lengths / count
        axes.stairs(shares, LENGTHS, color=colour, lw=1.8, label=source.name)
    axes.set_xscale("log", base=2)
    axes.set_xlim(LENGTHS[first], LENGTHS[last + 1])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("% of its documents", color=INK)
    if len(sources) > 1:
        axes.legend(frameon=False, fontsize=9)
    _finish(axes, "tokens in a document", "How long its documents are")
    axes.tick_params(axis="x", labelsize=8.5)


def _scores(axes: Axes, source: Source, colour: str) -> None:
    cut = source.manifest["cleaning"]["filter"]
    every = source.low_scores + source.kept_scores
    axes.stairs(every, SCORES, fill=True, color=GONE, label="removed")
    axes.stairs(source.kept_scores, SCORES, fill=True, color=colour, label="kept")
    axes.axvline(cut["threshold"], color=INK, lw=1, ls=(0, (4, 2)))
    axes.set_xlim(0, 1)
    axes.set_ylabel("documents", color=INK)
    axes.legend(frameon=False, fontsize=9)
    title = (
        f"{source.name}: the best {cut['keep']:.0%} of {cut['scored']:,} documents, from a score of "
        f"{cut['threshold']:.2f} on"
    )
    _finish(axes, "score of the filter", title)


def _finish(axes: Axes, xlabel: str, title: str) -> None:
    axes.set_title(title, fontsize=10.5, fontweight="bold", color=INK, loc="left")
    axes.set_xlabel(xlabel, color=INK)
    axes.grid(axis="x" if axes.get_ylabel() == "" else "y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _short(count: float) -> str:
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {sign}"
    return f"{count:.0f}"
