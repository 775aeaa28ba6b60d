"""The picture of a plan: the source of every layer, the growth of every axis, one grown matrix beside its
source.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.growth.decision import Step
from outgrow.growth.engine.execute import Expander
from outgrow.growth.engine.rows import Reader
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
ORIGINS = {  # Okabe and Ito's colours, which colour-blind readers tell apart
    Origin.ORIGINAL: ("the source's own", "#0072B2"),
    Origin.COPY: ("further copies", "#56B4E9"),
    Origin.NEW: ("new", "#E69F00"),
}


def draw(plan: Plan, path: Path | str, reader: Reader | None = None) -> None:
    """Write the picture to `path`, whose suffix says the format; the matrices need a `reader` of the source's
    weights.

    Raises:
        UserError: the path cannot be written, or its suffix is no picture format.
    """
    try:
        figure = build(plan, reader)
        figure.savefig(path, dpi=150, facecolor="white")
    except (ValueError, OSError) as fault:
        raise UserError(
            f"figure {str(path)!r}: cannot be written ({fault}); give a path that ends in .png, .pdf or .svg"
        ) from None


def build(plan: Plan, reader: Reader | None = None) -> Figure:
    """Draw the figure itself: no window, no global state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(1.1, 1.15, 2.6), hspace=0.03)
    _layers(parts[0].subplots(), plan)
    _spaces(parts[1].subplots(), plan)
    step = shown_step(plan)
    _matrices(parts[2], plan, step, reader)
    reasons = len(plan.certificate.reasons)
    proof = "certified lossless"
    if reasons:
        plural = "s" * (reasons > 1)
        proof = f"not lossless ({reasons} reason{plural})"
    before = _count(plan.source_parameters)
    after = _count(plan.target_parameters)
    size = f"{before} → {after} parameters"
    figure.suptitle(
        f"{plan.family.name} grown by {plan.operator}: {size}, {proof}",
        fontsize=13,
        color=INK,
        x=0.01,
        ha="left",
    )
    return figure


def _count(number: int) -> str:
    if number < 1e6:
        return f"{number:,}"
    millions = number / 1e6
    return f"{millions:,.4g} M"


def shown_step(plan: Plan) -> Step:
    """The matrix that writes the queries of the first layer; of a family whose roles are not known, its first
    matrix.
    """
    first = [step for step in plan.steps if step.tensor.layer == 0]
    matrices = [step for step in first if len(step.shape) == 2]
    for step in matrices:
        written = spaces(step.tensor.line.out)
        if "qk" in {space.name for space in written}:
            return step
    return matrices[0]


def _layers(axes: Axes, plan: Plan) -> None:
    """Draw source layers below, target layers above, a line from each to each that it feeds."""
    layers = plan.layers
    last = max(plan.layers.target - 1, 1)
    position = np.array([last / 2])
    if layers.source > 1:
        position = np.linspace(0, last, layers.source)
    # Markers (points²) and numbers so small that neighbours stay apart.
    side = 490 / layers.target
    size = float(np.clip(side**2, 12, 260))
    font = float(np.clip(260 / layers.target, 3, 9))
    centred: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 3, "fontsize": font}
    square: dict[str, Any] = {"s": size, "marker": "s", "zorder": 2}
    for source, x in enumerate(position):
        axes.scatter(x, 0, color=INK, **square)
        axes.text(x, 0, str(source), color="white", **centred)
    pairs = zip(layers.layers, layers.identity, strict=True)
    for number, (source, idle) in enumerate(pairs):
        again = source in layers.layers[:number]
        origin = Origin.COPY if again else Origin.ORIGINAL
        _, colour = ORIGINS[origin]
        outside = inside = colour
        ink = "white"
        line = "-"
        if idle:
            outside, inside, ink, line = IDLE, "white", INK, ":"
        # Lines from the layers below that feed it: a layer between two has both.
        sources = [source]
        if number in layers.between:
            sources.append(source + 1)
        for below in sources:
            across = [position[below], number]
            axes.plot(across, [0, 1], color=outside, linestyle=line, zorder=1)
        axes.scatter(number, 1, facecolor=inside, edgecolor=outside, linestyle=line, **square)
        axes.text(number, 1, str(number), color=ink, **centred)
    note = "; dotted: starts as the identity" if any(layers.identity) else ""
    counts = f"{layers.source} source layers (below) feed {layers.target} target layers"
    title = f"{counts}, depth {layers.rule!r}{note}"
    axes.set_title(title, **_TITLE)
    right = last + 0.7
    axes.set(xlim=(-0.7, right), ylim=(-0.35, 1.35))
    axes.axis("off")


_TITLE: dict[str, Any] = {"fontsize": 10.5, "loc": "left", "color": INK}


def _spaces(axes: Axes, plan: Plan) -> None:
    """Draw one bar per space: its target indices by their origin, with the rule in words."""
    rows = spaces_table(plan)
    for y, (space, rule) in enumerate(rows):
        write = plan.recipe.expansions[space].write
        left = 0.0
        for origin, (_, colour) in ORIGINS.items():
            is_of_origin = of_axis(write) == origin
            share = float(is_of_origin.mean()) if write.target else 0.0
            axes.barh(y, share, left=left, color=colour, height=0.72)
            left += share
        words = rule
        if rule == "unchanged":
            words = f"{write.target}, unchanged"
        axes.text(1.01, y, words, va="center", fontsize=8.5, color=INK)
    axes.legend(
        handles=_legend(),
        fontsize=8.5,
        frameon=False,
        ncols=3,
        loc="lower right",
        bbox_to_anchor=(1, 1),  # above the bars
        borderaxespad=0.1,
    )
    names = [space for space, _ in rows]
    places = range(len(rows))
    axes.set_yticks(places, names, fontsize=9, color=INK)
    bottom = len(rows) - 0.5
    axes.set(xlim=(0, 2.6), ylim=(bottom, -0.6), xticks=[])
    axes.set_title("every space, by where its target indices come from", **_TITLE)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)


def _matrices(figure: Any, plan: Plan, step: Step, reader: Reader | None) -> None:
    """Draw the source matrix and the grown one at one scale, and the origins of the grown one's entries."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    has_weights = reader is not None and step.source is not None
    columns = 3 if has_weights else 1
    widths = _widths(step)[-columns:]
    panels = np.atleast_1d(figure.subplots(1, columns, width_ratios=widths))
    if columns == 3:
        assert reader is not None
        before = source_matrix(plan, step, reader)
        after = grown_matrix(plan, step, reader)
        _weights(figure, list(panels[:2]), (before, after), _short(step.name))
    # One colour per origin, in the order of their numbers.
    norm = BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3)
    by_origin = [ORIGINS[origin] for origin in Origin]
    colours = ListedColormap([colour for _, colour in by_origin])
    sample = _sampled(origins(plan, step))
    last = panels[-1]
    _show(last, step.shape, sample, cmap=colours, norm=norm)
    entries = "its entries"
    if columns == 1:
        rows, width = step.shape
        entries = f"the entries of {_short(step.name)}, {rows}×{width},"
    last.set_title(f"where {entries} come from", **_TITLE)


def _weights(figure: Any, panels: list[Axes], matrices: tuple[np.ndarray, np.ndarray], name: str) -> None:
    """Draw the source matrix and the grown one at one scale: entries, or blocks of a large one."""
    before, after = matrices
    longest = max(*before.shape, *after.shape)
    has_entries = longest <= CELLS
    shown = matrices if has_entries else tuple(map(_blocks, matrices))
    # A few entries that are far larger than all others would leave the rest pale.
    largest = [float(np.quantile(np.abs(part), 0.995)) for part in shown]
    limit = max(largest) or 1.0
    scale: dict[str, Any] = {"vmin": 0.0, "vmax": limit, "cmap": "magma"}
    label = "root mean square of each block"
    if has_entries:
        scale |= {"vmin": -limit, "cmap": "RdBu_r"}
        label = "entry"
    owners = ("the source's", "grown")
    for axes, matrix, part, owner in zip(panels, matrices, shown, owners, strict=True):
        image = _show(axes, matrix.shape, part, **scale)
        rows, width = matrix.shape
        title = f"{owner} {name},\n{rows}×{width}"
        axes.set_title(title, **_TITLE)
    figure.colorbar(image, ax=panels, label=label, shrink=0.85)


def _legend() -> list[Any]:
    from matplotlib.patches import Patch

    colours = ORIGINS.values()
    return [Patch(color=colour, label=name) for name, colour in colours]


def _widths(step: Step) -> list[float]:
    width = step.shape[1]
    share = step.source_shape[1] / width
    return [max(share, 0.45), 1.0, 1.0]


def _short(name: str) -> str:
    module = name.removesuffix(".weight")
    return module.rpartition(".")[2]


def _show(axes: Axes, shape: tuple[int, ...], values: np.ndarray, **style: Any) -> Any:
    """Draw an image whose axes count the matrix's own rows and columns."""
    axes.tick_params(colors=INK, labelsize=8)
    rows = shape[0]
    columns = shape[1]
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    return axes.imshow(values, extent=extent, interpolation="nearest", aspect="equal", **style)


def source_matrix(plan: Plan, step: Step, reader: Reader) -> np.ndarray:
    """Read the source of a step as numbers: (rows, columns)."""
    assert step.source is not None
    raw = reader.read(step.source)
    return to_float(raw, plan.source_dtype(step.source))


def grown_matrix(plan: Plan, step: Step, reader: Reader) -> np.ndarray:
    """Compute a grown tensor as numbers: (rows, columns)."""
    raw = Expander(plan, step, reader).complete()
    return to_float(raw, plan.dtype(step))


def _blocks(matrix: np.ndarray) -> np.ndarray:
    """Compute the root mean square of blocks; of a small matrix, of each entry."""
    squares = matrix.astype(np.float64) ** 2
    rows, columns = matrix.shape
    row_edges = _edges(rows)
    column_edges = _edges(columns)
    heights = np.diff(row_edges)[:, None]
    widths = np.diff(column_edges)
    # The mean over the rows of each block, then over its columns.
    sums = np.add.reduceat(squares, row_edges[:-1], axis=0)
    by_rows = sums / heights
    sums = np.add.reduceat(by_rows, column_edges[:-1], axis=1)
    by_blocks = sums / widths
    return np.sqrt(by_blocks)


def _edges(length: int) -> np.ndarray:
    """Divide an axis into at most `CELLS` blocks: the first index of each, and the length."""
    blocks = min(CELLS, length)
    edges = np.linspace(0, length, blocks + 1)
    return edges.astype(int)


def _sampled(values: np.ndarray) -> np.ndarray:
    """Take every so many-th row and column, at most a few hundred."""
    indices = []
    for size in values.shape:
        count = min(size, 2 * CELLS)
        places = np.linspace(0, size - 1, count)
        indices.append(places.round().astype(int))
    return values[np.ix_(*indices)]
