"""The picture of a plan: which source layer feeds which target layer, how every axis grows, and one grown matrix beside its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.growth.decision import Step
from outgrow.growth.engine.execute import Expander, Reader
from outgrow.growth.origin import Origin, of_axis, origins
from outgrow.growth.plan import Plan
from outgrow.growth.words import spaces_table
from outgrow.model.base.errors import UserError
from outgrow.model.dtypes import to_float
from outgrow.model.notation import spaces

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 160  # a heat-map shows at most so many rows and columns; larger matrices are shown block by block
INK, IDLE = "#333333", "#999999"
ORIGINS = {Origin.ORIGINAL: ("the source's own", "#0072B2"), Origin.COPY: ("further copies", "#56B4E9"), Origin.NEW: ("new", "#E69F00")}


def draw(plan: Plan, path: Path | str, reader: Reader | None = None) -> None:
    """Write the picture to `path`, whose suffix says the format; the matrices need a `reader` of the source's weights.

    Raises:
        UserError: the path cannot be written, or its suffix is no picture format.
    """
    try:
        build(plan, reader).savefig(path, dpi=150, facecolor="white")
    except (ValueError, OSError) as fault:
        raise UserError(f"figure {str(path)!r}: cannot be written ({fault}); give a path that ends in .png, .pdf or .svg") from None


def build(plan: Plan, reader: Reader | None = None) -> Figure:
    """The figure itself: no window, no global state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(1.1, 1.15, 2.6), hspace=0.03)
    _layers(parts[0].subplots(), plan)
    _spaces(parts[1].subplots(), plan)
    step = shown_step(plan)
    _matrices(parts[2], plan, step, reader)
    reasons = len(plan.certificate.reasons)
    proof = f"not lossless ({reasons} reason{'s' * (reasons > 1)})" if reasons else "certified lossless"
    size = f"{_count(plan.source_parameters)} → {_count(plan.target_parameters)} parameters"
    figure.suptitle(f"{plan.family.name} grown by {plan.operator}: {size}, {proof}", fontsize=13, color=INK, x=0.01, ha="left")
    return figure


def _count(number: int) -> str:
    return f"{number:,}" if number < 1e6 else f"{number / 1e6:,.4g} M"


def shown_step(plan: Plan) -> Step:
    """The matrix that writes the queries of the first layer; of a family whose roles are not known, its first matrix."""
    matrices = [step for step in plan.steps if len(step.shape) == 2 and step.tensor.layer == 0]
    queries = [step for step in matrices if any(space.name == "qk" for space in spaces(step.tensor.line.out))]
    return (queries or matrices)[0]


def _layers(axes: Axes, plan: Plan) -> None:
    """Source layers below, target layers above, a line from each to each that it feeds."""
    layers, last = plan.layers, max(plan.layers.target - 1, 1)
    place = np.linspace(0, last, layers.source) if layers.source > 1 else np.array([last / 2])
    size = float(np.clip((490 / layers.target) ** 2, 12, 260))  # points², so that neighbours stay apart
    label: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": float(np.clip(260 / layers.target, 3, 9)), "zorder": 3}
    for source, x in enumerate(place):
        axes.scatter(x, 0, s=size, marker="s", color=INK, zorder=2)
        axes.text(x, 0, str(source), color="white", **label)
    for number, (source, idle) in enumerate(zip(layers.layers, layers.identity, strict=True)):
        colour = ORIGINS[Origin.COPY if source in layers.layers[:number] else Origin.ORIGINAL][1]
        line, inside, outside = (":", "white", IDLE) if idle else ("-", colour, colour)
        axes.plot([place[source], number], [0, 1], color=outside, linestyle=line, zorder=1)
        axes.scatter(number, 1, s=size, marker="s", facecolor=inside, edgecolor=outside, linestyle=line, zorder=2)
        axes.text(number, 1, str(number), color=INK if idle else "white", **label)
    note = "; dotted: starts as the identity" if any(layers.identity) else ""
    axes.set_title(f"{layers.source} source layers (below) feed {layers.target} target layers, depth {layers.rule!r}{note}", **_TITLE)
    axes.set(xlim=(-0.7, last + 0.7), ylim=(-0.35, 1.35))
    axes.axis("off")


_TITLE: dict[str, Any] = {"fontsize": 10.5, "loc": "left", "color": INK}


def _spaces(axes: Axes, plan: Plan) -> None:
    """One bar per space: its target indices by where they come from, with the rule in words."""
    rows = spaces_table(plan)
    for y, (space, rule) in enumerate(rows):
        write, left = plan.recipe.expansions[space].write, 0.0
        for origin, (_, colour) in ORIGINS.items():
            share = float((of_axis(write) == origin).mean()) if write.target else 0.0
            axes.barh(y, share, left=left, color=colour, height=0.72)
            left += share
        axes.text(1.01, y, rule if rule != "unchanged" else f"{write.target}, unchanged", va="center", fontsize=8.5, color=INK)
    axes.legend(handles=_legend(), loc="lower right", fontsize=8.5, frameon=False, bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)
    axes.set_yticks(range(len(rows)), [space for space, _ in rows], fontsize=9, color=INK)
    axes.set(xlim=(0, 2.6), ylim=(len(rows) - 0.5, -0.6), xticks=[])
    axes.set_title("every space, by where its target indices come from", **_TITLE)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)


def _matrices(figure: Any, plan: Plan, step: Step, reader: Reader | None) -> None:
    """The source matrix and the grown one at one scale, and where the grown one's entries come from."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    columns = 3 if reader is not None and step.source is not None else 1
    panels = np.atleast_1d(figure.subplots(1, columns, width_ratios=_widths(step)[-columns:]))
    if columns == 3:
        assert reader is not None
        before, after = source_matrix(plan, step, reader), grown_matrix(plan, step, reader)
        signed = max(*before.shape, *after.shape) <= CELLS
        shown = [matrix if signed else _blocks(matrix) for matrix in (before, after)]
        limit = max(float(np.quantile(np.abs(part), 0.995)) for part in shown) or 1.0
        scale: dict[str, Any] = {"vmin": -limit if signed else 0.0, "vmax": limit, "cmap": "RdBu_r" if signed else "magma"}
        for axes, matrix, part, name in zip(panels[:2], (before, after), shown, ("the source's", "grown"), strict=True):
            image = _show(axes, matrix.shape, part, **scale)
            axes.set_title(f"{name} {_short(step.name)},\n{matrix.shape[0]}×{matrix.shape[1]}", **_TITLE)
        figure.colorbar(image, ax=list(panels[:2]), label="entry" if signed else "root mean square of each block", shrink=0.85)
    norm = BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3)
    colours = ListedColormap([ORIGINS[origin][1] for origin in (Origin.NEW, Origin.COPY, Origin.ORIGINAL)])
    _show(panels[-1], step.shape, _sampled(origins(plan, step)), cmap=colours, norm=norm)
    what = "its entries" if columns == 3 else f"the entries of {_short(step.name)}, {step.shape[0]}×{step.shape[1]},"
    panels[-1].set_title(f"where {what} come from", **_TITLE)


def _legend() -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=name) for name, colour in ORIGINS.values()]


def _widths(step: Step) -> list[float]:
    share = step.source_shape[1] / step.shape[1]
    return [max(share, 0.45), 1.0, 1.0]


def _short(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def _show(axes: Axes, shape: tuple[int, ...], values: np.ndarray, **style: Any) -> Any:
    """An image whose axes count the matrix's own rows and columns."""
    axes.tick_params(colors=INK, labelsize=8)
    return axes.imshow(values, extent=(-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5), interpolation="nearest", aspect="equal", **style)


def source_matrix(plan: Plan, step: Step, reader: Reader) -> np.ndarray:
    """The source of a step as numbers, (rows, columns)."""
    assert step.source is not None
    return to_float(reader.read(step.source), plan.source_dtype(step.source))


def grown_matrix(plan: Plan, step: Step, reader: Reader) -> np.ndarray:
    """A grown tensor as numbers, (rows, columns)."""
    return to_float(Expander(plan, step, reader).whole(), plan.dtype(step))


def _blocks(matrix: np.ndarray) -> np.ndarray:
    """The root mean square of blocks; of a small matrix, of each entry."""
    squares = matrix.astype(np.float64) ** 2
    for axis in (0, 1):
        edges = np.linspace(0, matrix.shape[axis], min(CELLS, matrix.shape[axis]) + 1).astype(int)
        squares = np.add.reduceat(squares, edges[:-1], axis=axis) / np.diff(edges).reshape((-1, 1) if axis == 0 else (1, -1))
    return np.sqrt(squares)


def _sampled(values: np.ndarray) -> np.ndarray:
    """Every so many-th row and column, at most a few hundred."""
    rows, columns = (np.linspace(0, size - 1, min(size, 2 * CELLS)).round().astype(int) for size in values.shape)
    return values[np.ix_(rows, columns)]
