"""Names beside points of a picture, each where it covers the least of what is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

ASIDE = 14  # points from a point to its name
STEP = 7  # points from one height that is tried to the next
STEPS = 24  # heights that are tried above the point, and as many below it
GAP = 2  # pixels at least between two names
SAMPLE = 6  # pixels from one sample of a line to the next
# steps that a name goes further away rather than cover one sample of a line, one point of it
OVER_LINE, OVER_POINT = 1.5, 10.0


@dataclass(frozen=True)
class Label:
    """A name for a point of the data."""

    across: float
    up: float
    text: str
    colour: str
    aligned: str = "left"  # at its left end, which is then beside the point: where there is room for it


def write_names(axes: Axes, labels: Sequence[Label], passed_over: str) -> None:
    """Write each name beside its point; none covers another text or leaves the axes, and none covers a line
    as far as that can be. A thin line leads to its point, which may be hidden under others.

    Args:
        passed_over: the colour of the lines that names may cover.
    """
    samples = np.concatenate([*_samples(axes, passed_over), np.empty((0, 3))])
    placed = [text.get_window_extent() for text in axes.texts]
    for label in sorted(labels, key=lambda label: -label.up):
        aligned, below, box = _find_room(axes, label, samples, placed)
        placed.append(box)
        _write(axes, label, aligned, below)


def _samples(axes: Axes, passed_over: str) -> Iterator[Any]:
    """What names should not cover, in pixels and steps: (sample, across-up-steps)."""
    for line in axes.get_lines():
        if line.get_color() == passed_over:
            continue
        vertices = line.get_transform().transform(line.get_xydata())
        yield _weighed(vertices, OVER_POINT)
        for begin, end in itertools.pairwise(vertices):
            count = int(np.hypot(*(end - begin)) / SAMPLE) + 1
            yield _weighed(np.linspace(begin, end, count), OVER_LINE)


def _weighed(samples: Any, steps: float) -> Any:
    weights = np.full((len(samples), 1), steps)
    return np.hstack([samples, weights])


def _find_room(axes: Axes, label: Label, samples: Any, placed: Sequence[Bbox]) -> tuple[str, float, Bbox]:
    """The side and the height, in points over its own, at which a name covers the least and is near."""
    figure: Any = axes.figure
    pixels = figure.dpi / 72
    text = axes.text(label.across, label.up, label.text, fontsize=9, fontweight="bold", va="center")
    size = text.get_window_extent()
    text.remove()

    def covered(box: Bbox) -> float:
        inside = (samples[:, :2] > box.min) & (samples[:, :2] < box.max)
        return float(samples[inside.all(axis=1), 2].sum())

    choices = []
    other = "right" if label.aligned == "left" else "left"
    for side, step in itertools.product((label.aligned, other), range(-STEPS, STEPS + 1)):
        across = ASIDE * pixels if side == "left" else -ASIDE * pixels - size.width
        box = size.translated(across, step * STEP * pixels).padded(GAP)
        if _is_free(box, axes, placed):
            choices.append((covered(box) + abs(step), side, step * STEP, box))
    if not choices:
        return label.aligned, 0.0, size
    _, side, height, box = min(choices, key=lambda choice: choice[0])
    return side, height, box


def _is_free(box: Bbox, axes: Axes, placed: Iterable[Bbox]) -> bool:
    """Check that a box lies inside of the axes and on no other name."""
    corners = axes.bbox.count_contains([box.p0, box.p1])
    return corners == 2 and not any(box.overlaps(other) for other in placed)


def _write(axes: Axes, label: Label, aligned: str, height: float) -> None:
    is_right = aligned == "left"
    name = axes.annotate(
        label.text,
        (label.across, label.up),
        xytext=(ASIDE if is_right else -ASIDE, height),
        textcoords="offset points",
        ha=aligned,
        va="center",
        fontsize=9,
        color=label.colour,
        fontweight="bold",
        zorder=3,  # over grey lines, under the point that the thin line leads to
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
    name.set_in_layout(False)  # so that the axes stay where the names were placed by them
