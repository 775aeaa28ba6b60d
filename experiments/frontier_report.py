"""The report on a frontier of flat models: tables, the law with its residuals, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.experiments.ends import End
from outgrow.experiments.figure import GRID, INK
from outgrow.experiments.frontier import (
    ArmWorth,
    Best,
    Flat,
    Law,
    best_sizes,
    bootstrap,
    fit,
    flat_points,
    interval_of,
    may_fit,
    residuals,
    worth_of_arms,
)
from outgrow.experiments.horizon_report import read_inputs
from outgrow.experiments.publish import Writer, write_together
from outgrow.experiments.table import amount, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE, PICTURE, RECORD = "frontier.md", "frontier.png", "frontier.json"
NO_LAW = "No law is fitted: that needs three sizes with three horizons each."


@dataclass(frozen=True)
class Frontier:
    """The answer of flat models: points, each budget's best size, and a law with its bootstrap, if any."""

    points: tuple[Flat, ...]
    best: tuple[Best, ...]
    law: Law | None
    draws: tuple[Law, ...]
    arms: tuple[ArmWorth, ...]


def frontier_of(ends: Sequence[End]) -> Frontier:
    """The frontier of the flat models among `ends`, and the worth of the other arms by its law.

    Raises:
        UserError: too few sizes or horizons.
    """
    points = flat_points(ends)
    best = best_sizes(points)
    if not may_fit(points):
        return Frontier(tuple(points), tuple(best), None, (), ())
    law = fit(points)
    draws = bootstrap(ends, law)
    arms = worth_of_arms(ends, law, draws)
    return Frontier(tuple(points), tuple(best), law, tuple(draws), tuple(arms))


def write(inputs: Sequence[str], out: Path) -> list[str]:
    """Write table, picture and record into `out`, and return what a reader should see of them.

    Args:
        inputs: run folders, or records of ends.

    Raises:
        UserError: the inputs are no decayed runs, or too few; `out` cannot be written.
    """
    _, ends, left_out = read_inputs(inputs)
    frontier = frontier_of(ends)
    writers: dict[str, Writer] = {
        TABLE: lambda path: path.write_text(markdown(frontier), encoding="utf-8"),
        PICTURE: lambda path: build(frontier).savefig(path, dpi=150, facecolor="white"),
        RECORD: lambda path: path.write_text(record(frontier), encoding="utf-8"),
    }
    paths = write_together(out, writers)
    notes = [folder.note for folder in left_out]
    files = [f"  {path}" for path in paths]
    return [markdown(frontier), *notes, *files]


def record(frontier: Frontier) -> str:
    """frontier.json: `best` is what a dry run reads (forecast.frontier)."""
    values: dict[str, Any] = {
        "best": [asdict(best) for best in frontier.best],
        "points": [asdict(point) for point in frontier.points],
        "law": None if frontier.law is None else asdict(frontier.law),
        "draws": [asdict(law) for law in frontier.draws],
    }
    return json.dumps(values, indent=1) + "\n"


def markdown(frontier: Frontier) -> str:
    """The best size of each budget, the law, its residuals, and what the arms are worth by it."""
    rows = []
    for best in frontier.best:
        star = "*" if best.at_edge else ""
        size = f"{best.parameters:,}{star}"
        loss = f"{best.val_loss:.4f}"
        rows.append([amount(best.flops), size, loss])
    parts = [
        "The size that ends lowest; a star: the largest or smallest that was measured there.",
        markdown_table(("FLOPs", "best size, parameters", "loss"), rows),
    ]
    if frontier.law is None:
        return "\n\n".join([*parts, NO_LAW]) + "\n"
    parts += [_law_sentence(frontier), _residual_table(frontier.points, frontier.law)]
    if frontier.arms:
        parts.append(_arm_table(frontier.arms))
    return "\n\n".join(parts) + "\n"


def _law_sentence(frontier: Frontier) -> str:
    parts = []
    for name in ("alpha", "beta"):
        value = getattr(frontier.law, name)
        interval = interval_of([getattr(law, name) for law in frontier.draws])
        spread = "" if interval is None else f" ({_spelled(interval)})"
        parts.append(f"{name} = {value:.3f}{spread}")
    return (
        f"L(N, D) = E + A / N^alpha + B / D^beta with {', '.join(parts)}; Huber's loss of the log losses, "
        f"95 % of {len(frontier.draws)} bootstrap draws over the runs. Residuals, measured over fitted:"
    )


def _spelled(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{low:.2f} to {high:.2f}"


def _residual_table(points: Sequence[Flat], law: Law) -> str:
    rows = []
    for point, residual in zip(points, residuals(points, law), strict=True):
        size = f"{point.parameters:,}"
        loss = f"{point.val_loss:.4f}"
        percent = f"{100 * residual:+.2f} %"
        rows.append([size, amount(point.tokens), loss, percent])
    return markdown_table(("parameters", "tokens", "loss", "residual"), rows)


def _arm_table(arms: Sequence[ArmWorth]) -> str:
    rows = []
    for arm in arms:
        own = "below the law's floor" if arm.speedup is None else f"{arm.speedup:.2f}"
        interval = "–" if arm.interval is None else _spelled(arm.interval)
        loss = f"{arm.end.val_loss:.4f}"
        rows.append([arm.end.name, loss, own, interval])
    return markdown_table(("end", "loss", "S by the law, source included", "95 %"), rows)


def build(frontier: Frontier) -> Figure:
    """Loss against FLOPs, a line for each size, and the law's residuals where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    losses, rest = figure.subplots(1, 2)
    sizes = sorted({point.parameters for point in frontier.points})
    for size in sizes:
        own = [point for point in frontier.points if point.parameters == size]
        own.sort(key=attrgetter("flops", "val_loss"))
        costs = [point.flops for point in own]
        ends = [point.val_loss for point in own]
        losses.plot(costs, ends, marker="o", label=f"{size:,} parameters")
    losses.plot(
        [best.flops for best in frontier.best],
        [best.val_loss for best in frontier.best],
        **{"color": INK, "linestyle": "", "marker": "*", "markersize": 12, "label": "best size"},
    )
    losses.set_xscale("log")
    losses.set_xlabel("FLOPs")
    losses.set_ylabel("validation loss, nats/token")
    losses.legend(fontsize=8, frameon=False)
    if frontier.law is None:
        rest.set_axis_off()
        rest.text(0.5, 0.5, "no law: fewer than\nthree sizes of three horizons", ha="center", color=INK)
    else:
        tokens = [point.tokens for point in frontier.points]
        rest.scatter(tokens, residuals(frontier.points, frontier.law), color=INK)
        rest.axhline(0.0, color=INK, linewidth=1)
        rest.set_xscale("log")
        rest.set_xlabel("tokens")
        rest.set_ylabel("log(measured / fitted)")
        rest.set_title("Residuals of L(N, D)", loc="left", fontsize=10.5, color=INK)
    for axes in (losses, rest):
        axes.grid(color=GRID, linewidth=0.8)
    return figure
