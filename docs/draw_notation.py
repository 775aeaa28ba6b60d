"""Draws docs/notation.png: four lines of a schema, the tensor that each describes, and the tensor that growth
makes of it.

python docs/draw_notation.py    seconds: rewrites docs/notation.png from a plan at toy size; nothing in the
                                picture is drawn by hand
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from outgrow.growth import Plan, plan
from outgrow.growth.decision import Step
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.figure import INK, ORIGINS
from outgrow.growth.origin import Origin, origins
from outgrow.model.notation import Axis, Product, size
from outgrow.model.presets import preset

PICTURE = Path(__file__).resolve().parent / "notation.png"
SOURCE = {
    "hidden_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 6,
    "vocab_size": 5,
}
TARGET = {"hidden_size": 6, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 9}
MODULES = (
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.fc1",
    "model.layers.0.mlp.fc2",
)
CELL = 0.28  # inches
TITLE = "A line of the schema, its tensor, and its growth. Numbers say which source row or column is taken."
MARK = {Fill.ZERO: "0", Fill.MEAN: "mean", Fill.RANDOM: "new"}


def drawn_plan() -> Plan:
    """A Phi of toy size, grown in width, heads and feed-forward size."""
    return plan(preset("tiny_source") | SOURCE | {"num_hidden_layers": 1}, TARGET, "lossless")


def labels(axis: AxisMap) -> list[str]:
    """Which source index each target index takes, or how it is new."""
    return [
        str(index) if fill == Fill.COPY else MARK[Fill(fill)]
        for index, fill in zip(axis.index, axis.fill, strict=True)
    ]


def inner(axis: Axis, sizes: Any) -> int:
    """The length of one head on a product axis `(kv group qk)`; of any other axis its whole length."""
    return size(axis.parts[-1], sizes) if isinstance(axis, Product) else size(axis, sizes)


def grid(axes: Axes, values: np.ndarray, heads: int, title: str) -> None:
    """One matrix, a square an entry, coloured by origin, with a heavy line between heads."""
    order = (Origin.NEW, Origin.COPY, Origin.ORIGINAL)
    colours = ListedColormap([ORIGINS[origin][1] for origin in order])
    axes.imshow(values, cmap=colours, norm=BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3), aspect="equal")
    axes.set_xticks(np.arange(-0.5, values.shape[1]), minor=True)
    axes.set_yticks(np.arange(-0.5, values.shape[0]), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0, labelsize=8, colors=INK)
    for row in range(heads, values.shape[0], heads):
        axes.axhline(row - 0.5, color=INK, linewidth=2)
    axes.set_title(title, fontsize=10, color=INK)
    for side in axes.spines.values():
        side.set_visible(False)


def row(figure: Figure, top: float, made: Plan, step: Step) -> None:
    """The line in words, the source's tensor and the grown one, below `top` inches."""
    line, tensor = step.tensor.line, step.tensor
    rows, columns = tensor.axes
    said = line.text.split(" +")[0].split(" tied")[0]
    texts = [
        (step.name.removesuffix(".weight"), 10, "normal"),
        (said, 12, "bold"),
        (f"stored as {rows} × {columns}", 10, "normal"),
    ]
    width, height = figure.get_size_inches()
    for number, (text, points, weight) in enumerate(texts):
        y = 1 - (top + 0.3 + 0.3 * number) / height
        figure.text(
            0.2 / width, y, text, fontsize=points, weight=weight, color=INK, family="monospace", va="center"
        )
    heads = inner(rows, made.growth.source), inner(rows, made.growth.target)
    source_labels = [list(map(str, range(length))) for length in step.source_shape]
    matrices = (
        (4.1, np.full(step.source_shape, int(Origin.ORIGINAL)), heads[0], source_labels, "source"),
        (7.2, origins(made, step), heads[1], [labels(axis) for axis in step.maps], "grown"),
    )
    for left, values, head, (down, across), name in matrices:
        n, m = values.shape
        axes = figure.add_axes(
            (left / width, 1 - (top + n * CELL) / height, m * CELL / width, n * CELL / height)
        )
        grid(axes, values, head, f"{name}: {n} × {m}")
        axes.set_xticks(range(m), across, rotation=90 if "new" in across or "mean" in across else 0)
        axes.set_yticks(range(n), down)
        axes.set_ylabel(str(rows), fontsize=9.5, color=INK)
        axes.set_xlabel(str(columns), fontsize=9.5, color=INK)


def build() -> Figure:
    """The whole picture."""
    made = drawn_plan()
    steps = {step.name: step for step in made.steps}
    shown = [steps[f"{module}.weight"] for module in MODULES]
    heights = [max(step.shape[0], 3) * CELL + 1.1 for step in shown]
    figure = Figure(figsize=(10.5, sum(heights) + 1.0))
    figure.text(0.02, 1 - 0.25 / figure.get_figheight(), TITLE, fontsize=12, color=INK, va="center")
    for step, top in zip(shown, np.cumsum([0.85, *heights]), strict=False):
        row(figure, float(top), made, step)
    handles = [Patch(color=colour, label=name) for name, colour in ORIGINS.values()]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=10)
    return figure


if __name__ == "__main__":
    build().savefig(PICTURE, dpi=90, facecolor="white")
    print(f"drew {PICTURE}")
