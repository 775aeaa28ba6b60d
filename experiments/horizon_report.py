"""The report on a study's horizons: a table, a sentence and a picture, all of them made of its ends."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.experiments.figure import GRID, INK
from outgrow.experiments.horizons import (
    RECORD,
    Bound,
    End,
    Point,
    SeedWorth,
    Worth,
    end_of,
    read_ends,
    worths,
    write_ends,
)
from outgrow.experiments.publish import Writer, mirror, write_together
from outgrow.experiments.recovery import EPSILON, Recovery, recoveries
from outgrow.experiments.report import Page, render
from outgrow.experiments.report import table as html_table
from outgrow.experiments.rules import unheld
from outgrow.experiments.runs import NULL_CONTROL, SCRATCH, LeftOut, Run, read_runs
from outgrow.experiments.table import UNDEFINED, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TABLE, PICTURE = "table.md", "horizons.png"
LINES, REPORT = "horizons.csv", "report.html"
PROJECT = "knowledge-transfer"  # in W&B
METHOD = (
    "Every run has decayed to its end, and only such ends are compared. Scratch's ends, the best of its "
    "optimizers, batch sizes and rates at each budget, are a curve L(C), linear in log C between two of "
    "them and never read outside: there S is told to be more (>) or less (<) than what its ends bound it "
    "by. An arm that ends at loss L for C FLOPs is worth S = L⁻¹(L) / C. Source excluded: the checkpoint was "
    "already there; included: it had to be trained first. FLOPs are counted from the model, attention "
    "included, for the tokens really processed. A rate is chosen on the seeds that all rates of its grid "
    "share; a star marks the edge of a grid. Intervals are 95 %, Student t over seeds, each held against "
    "scratch's runs of the same seed."
)
RECOVERED = (
    "Recovery: spike is what the growth added to the validation loss, over means that the training loss is "
    "back at its value before. R = (control − grown) / (control − scratch) at equal tokens, 1 is scratch. "
    f"t_mix is the tokens after the growth until a decayed end is within {EPSILON} nats of scratch's."
)
MARKERS = {"adamw": "o", "muon": "s", "adamw_8bit": "^"}
DASHES = {"adamw": (0, (3, 2))}
LINE = 14  # points from one label to the next
TITLE_LETTERS = 94  # that the picture is wide enough for
FEW = 6  # lines whose names stand at their ends
# scratch is black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8B5A2B", "#6A3D9A", "#999999")
HEADINGS = (
    *("arm", "optimizer", "tokens", "tokens a parameter", "learning rate", "seeds", "TFLOP", "loss"),
    *("S, source excluded", "S, source included", "nats against scratch at equal FLOPs"),
)

SEED_HEADINGS = (
    *("arm", "optimizer", "tokens", "seed", "loss", "S, source included"),
    "nats against scratch at equal FLOPs",
)
RECOVERY_HEADINGS = (
    *("arm", "optimizer", "tokens", "grown at", "spike, nats", "tokens until over"),
    *("nats against scratch at equal tokens", "R", "t_mix"),
)


def write(inputs: Sequence[str], out: Path, *, wandb: bool = False) -> list[str]:
    """Write table, picture, report and records of the ends in `inputs` into `out`, and return what a reader
    should see of them.

    Args:
        inputs: run folders, or records of ends that an earlier call wrote.
        wandb: mirror table and picture into W&B too.

    Raises:
        UserError: a folder is no run, an end has not decayed, the ends cannot be compared, or `out` cannot be
            written.
    """
    runs, ends, left_out = read_inputs(inputs)
    rows = worths(list(ends.values()))
    study = runs[0].study if runs else out.resolve().name

    remarks = unheld(list(ends.values()))

    def report(path: Path) -> None:
        text = html(study, rows, path.with_name(PICTURE), remarks)
        path.write_text(text, encoding="utf-8")

    writers: dict[str, Writer] = {
        TABLE: lambda path: path.write_text(markdown(rows), encoding="utf-8"),
        PICTURE: lambda path: draw(rows, path),
        RECORD: lambda path: write_ends(path, ends.values()),
        LINES: lambda path: write_csv(list(map(flat_row, rows)), path),
        REPORT: report,
    }
    paths = write_together(out, writers)
    if wandb:
        pictures = {"horizons": out / PICTURE}
        mirror(study, list(map(flat_row, rows)), pictures, {"answer": answer(rows)}, PROJECT)
    notes = [f"left out: {item.folder.name}, {item.reason}" for item in left_out]
    return [markdown(rows), *remarks, *notes, *(f"  {path}" for path in paths)]


def read_inputs(inputs: Sequence[str]) -> tuple[list[Run], dict[str, End], list[LeftOut]]:
    """The runs among `inputs`, all ends by name, those of records too, and the folders that are left out.

    Raises:
        UserError: a folder is no run, a record is damaged, or an end has not decayed.
    """
    records = [name for name in inputs if name.endswith(".json")]
    folders = [name for name in inputs if name not in records]
    runs, left_out = read_runs(folders) if folders else ([], [])
    ends: dict[str, End] = {}
    for record in records:
        ends |= {end.name: end for end in read_ends(Path(record))}
    ends |= {end.name: end for end in map(end_of, runs)}
    return runs, ends, left_out


def markdown(rows: Sequence[Worth]) -> str:
    """The block that READMEs carry: the answer, the best of every arm, every seed where there are several,
    and the recovery of what grew inside its run.
    """
    parts = [answer(rows), table(rows)]
    if seeds := seed_cells(rows):
        parts += [
            "Every seed, against scratch's runs of the same seed:",
            markdown_table(SEED_HEADINGS, seeds),
        ]
    if grown := recovery_cells(rows):
        parts += [RECOVERED, markdown_table(RECOVERY_HEADINGS, grown)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: arm and optimizer to the left, numbers to the right."""
    alignment = "---|---|" + "---:|" * (len(headings) - 2)
    lines = [" | ".join(cells) for cells in (headings, *rows)]
    heading, *body = [f"| {line} |" for line in lines]
    return "\n".join([heading, f"|{alignment}", *body]) + "\n"


def table(rows: Sequence[Worth]) -> str:
    """A Markdown table, one row for each arm, optimizer and horizon.

    A star: the best rate is at the edge of its grid.
    """
    return markdown_table(HEADINGS, list(map(cells, rows)))


def cells(worth: Worth) -> list[str]:
    """One row of the table, under HEADINGS."""
    point = worth.point
    star = "*" if point.at_edge else ""
    included = _speedup(worth.speedup_included, worth.bound_included)
    if worth.interval_included is not None and point.arm != SCRATCH:
        included += f" ± {worth.interval_included:.2f}"
    difference = _number(worth.difference, "{:+.4f}")
    if worth.difference_interval is not None and point.arm != SCRATCH:
        difference += f" ± {worth.difference_interval:.4f}"
    return [
        point.arm,
        point.optimizer,
        millions(point.tokens),
        f"{point.tokens_per_parameter:.0f}",
        f"{point.learning_rate:g}{star}",
        seed_numbers(point),
        f"{point.paid / 1e12:.2f}",
        f"{point.val_loss:.4f}",
        _speedup(worth.speedup_excluded, worth.bound_excluded),
        included,
        difference,
    ]


def millions(tokens: float) -> str:
    """6.5 M"""
    return f"{tokens / 1e6:.1f} M"


def seed_cells(rows: Sequence[Worth]) -> list[list[str]]:
    """Every seed of the arms that have several, under SEED_HEADINGS."""
    lines = []
    for row in rows:
        if len(row.seeds) > 1:
            lines += [_seed_row(row.point, seed) for seed in row.seeds]
    return lines


def _seed_row(point: Point, seed: SeedWorth) -> list[str]:
    return [
        point.arm,
        point.optimizer,
        millions(point.tokens),
        str(seed.seed),
        f"{seed.val_loss:.4f}",
        _number(seed.speedup, "{:.2f}"),
        _number(seed.difference, "{:+.4f}"),
    ]


def recovery_cells(rows: Sequence[Worth]) -> list[list[str]]:
    """Every end of a run that grew on its way, under RECOVERY_HEADINGS."""
    measured = recoveries([row.point for row in rows], SCRATCH)
    return list(map(_recovery_row, measured))


def _recovery_row(recovery: Recovery) -> list[str]:
    point = recovery.point
    growth = recovery.growth
    mixing = recovery.mixing
    never = growth.over_tokens is None
    return [
        point.arm,
        point.optimizer,
        millions(point.tokens),
        millions(growth.tokens),
        _known(recovery.spike, "{:+.3f}"),
        "not yet" if never else millions(growth.over_tokens or 0),
        _known(recovery.gap, "{:+.4f}"),
        _known(recovery.share, "{:.2f}"),
        UNDEFINED if mixing is None else f"{mixing.bound} {millions(mixing.tokens)}".strip(),
    ]


def _known(value: float | None, form: str) -> str:
    return UNDEFINED if value is None else form.format(value)


def flat_row(worth: Worth) -> dict[str, Any]:
    """A row as one level of plain values, at full precision: a line of horizons.csv."""
    point = worth.point
    values = {field.name: getattr(worth, field.name) for field in fields(Worth)}
    del values["point"]
    values["seeds"] = " ".join(str(seed.seed) for seed in worth.seeds)
    values["seed_losses"] = " ".join(repr(seed.val_loss) for seed in worth.seeds)
    return {
        "arm": point.arm,
        "optimizer": point.optimizer,
        "tokens": point.tokens,
        "tokens_per_parameter": point.tokens_per_parameter,
        "learning_rate": point.learning_rate,
        "at_edge": point.at_edge,
        "batch_tokens": point.batch_tokens,
        "flops": point.flops,
        "paid_flops": point.paid,
        "val_loss": point.val_loss,
        **values,
    }


def html(study: str, rows: Sequence[Worth], picture: Path, remarks: Sequence[str] = ()) -> str:
    """The page of a comparison of decayed ends. `picture` is a PNG file and goes in as data; `remarks` name
    the rules of a claim that the ends do not keep.
    """
    arms = sorted({row.point.arm for row in rows})
    devices = sorted({end.device for row in rows for end in row.point.ends})
    lines = list(map(cells, rows))
    parts = [
        f"<p><b>{escape(answer(rows))}</b></p>",
        "<h2>Each arm at its best learning rate and batch, at every horizon</h2>",
        html_table(HEADINGS, lines, [line[0] for line in lines]),
    ]
    if seeds := seed_cells(rows):
        parts += ["<h2>Every seed</h2>", html_table(SEED_HEADINGS, seeds)]
    if grown := recovery_cells(rows):
        parts += ["<h2>Recovery</h2>", f"<p>{escape(RECOVERED)}</p>", html_table(RECOVERY_HEADINGS, grown)]
    if remarks:
        items = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
        parts += ["<h2>Rules of a claim that are not kept</h2>", f"<ul>{items}</ul>"]
    parts += [
        "<h2>Method</h2>",
        f"<p>{escape(METHOD)}</p>",
        f"<h2>Machine</h2><p>{escape(', '.join(devices))}. Nothing here is timed.</p>",
    ]
    page = Page(
        study=study,
        question="what is a decayed end worth?",
        about=f"{len(rows)} decayed ends of {len(arms)} arms ({', '.join(arms)}).",
        answer=answer(rows),
        parts=parts,
    )
    return render(page, picture)


def seed_numbers(point: Point) -> str:
    """The seeds of a point: 0, 1, 2."""
    return ", ".join(str(end.seed) for end in point.ends)


def _speedup(value: float | None, bound: Bound | None) -> str:
    return str(bound) if value is None else f"{value:.2f}"


def _number(value: float | None, form: str) -> str:
    return "out of range" if value is None else form.format(value)


def answer(rows: Sequence[Worth]) -> str:
    """The finding in two sentences: what the best grown arm is worth at the longest horizon that one has, and
    where the control ends for the same FLOPs.
    """
    grown = [row for row in rows if is_grown(row, rows)]
    if not grown:
        return "No arm grew, so nothing can be said of a speed-up."
    best = max(grown, key=lambda row: (row.point.tokens, _least_speedup(row), -row.point.val_loss))
    point = best.point
    count = len(point.ends)
    plural = "s" if count > 1 else ""
    seeds = f"{count} seed{plural}: {seed_numbers(point)}"
    return (
        f"At {point.tokens_per_parameter:.0f} tokens a parameter {_verdict(best)}: {point.arm} is worth S "
        f"{_relation(best)} against scratch, everything paid ({seeds}). {_control(best, rows)}"
    )


def _least_speedup(row: Worth) -> float:
    """The speed-up, source included, that a row is known to reach."""
    if row.speedup_included is not None:
        return row.speedup_included
    bound = row.bound_included
    return bound.value if bound is not None and bound.side == ">" else 0.0


def _relation(row: Worth) -> str:
    """A row's speed-up as the end of a sentence: = 1.21 ± 0.27, > 0.93."""
    if row.speedup_included is None:
        return str(row.bound_included)
    spread = row.interval_included
    interval = "" if spread is None else f" ± {spread:.2f}"
    return f"= {row.speedup_included:.2f}{interval}"


def _verdict(row: Worth) -> str:
    """The verdict on growth; an interval that holds S = 1 gives none, nor does a bound on its other side."""
    speedup, bound = row.speedup_included, row.bound_included
    if speedup is None:
        assert bound is not None
        if bound.side == ">":
            return (
                "growth pays" if bound.value >= 1.0 else "scratch ends too early to tell whether growth pays"
            )
        return (
            "growth does not pay"
            if bound.value <= 1.0
            else "scratch begins too late to tell whether growth pays"
        )
    interval = row.interval_included or 0.0
    if interval and abs(speedup - 1.0) <= interval:
        return "the seeds do not tell whether growth pays"
    return "growth pays" if speedup > 1.0 else "growth does not pay"


def is_grown(row: Worth, rows: Sequence[Worth]) -> bool:
    """Check for an arm that is neither scratch nor the control."""
    return row.point.arm != SCRATCH and not is_control(row, rows)


def is_control(row: Worth, rows: Sequence[Worth]) -> bool:
    """Check for a network that stays smaller than scratch's: trained longer, not bigger."""
    largest = max(other.point.parameters for other in rows)
    return row.point.parameters < largest


def _control(best: Worth, rows: Sequence[Worth]) -> str:
    """The control's end that cost most nearly what `best` did, against it."""
    controls = [row.point for row in rows if is_control(row, rows)]
    plain = [point for point in controls if point.arm != NULL_CONTROL]
    own = best.point

    def distance(point: Point) -> tuple[float, float]:
        return abs(math.log(point.paid / own.paid)), point.val_loss

    near = min(plain or controls, key=distance)
    gap = near.val_loss - own.val_loss
    side = "higher" if gap > 0 else "lower"
    near_paid = f"{near.paid / 1e12:.2f}"
    own_paid = f"{own.paid / 1e12:.2f}"
    return (
        f"The control, {near.arm} trained on for {near_paid} TFLOP, ends {abs(gap):.3f} nats "
        f"{side} than {own.arm} for {own_paid}."
    )


def draw(rows: Sequence[Worth], path: Path) -> None:
    """Write the picture: where each arm's decayed ends lie against scratch's curve, and what they are
    worth."""
    build(rows).savefig(path, dpi=150, facecolor="white")


def build(rows: Sequence[Worth]) -> Figure:
    """The figure itself, without any state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.0), layout="constrained")
    losses, speedups = figure.subplots(1, 2)
    by_line: dict[tuple[str, str], list[Worth]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.point.tokens):
        line = (row.point.arm, row.point.optimizer)
        by_line[line].append(row)
    colours = _colours([arm for arm, _ in sorted(by_line)])
    # the arms' names stand at their ends, as far as there is room for them
    named_at_ends = len(by_line) <= FEW
    at_losses: list[Label] = []
    at_speedups: list[Label] = []
    for line, own in sorted(by_line.items()):
        arm, optimizer = line
        style: dict[str, Any] = {"color": colours[arm], "label": f"{arm}, {optimizer}"}
        style["linestyle"] = DASHES.get(optimizer, "-")
        style["marker"] = MARKERS.get(optimizer, "o")
        style["linewidth"] = 2.6 if arm == SCRATCH else 1.4
        style |= {"markersize": 7, "zorder": 4}
        at_losses.append(_plot_losses(losses, own, style))
        in_range = [row for row in own if row.speedup_included is not None]
        if arm != SCRATCH:
            label = _plot_speedups(speedups, in_range, style)
            if label is not None:
                at_speedups.append(label)
    speedups.axhline(1.0, color=INK, linewidth=2.6)
    speedups.annotate(
        "scratch",
        (0.99, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
        color=INK,
    )
    _finish(
        losses,
        "TFLOP, the source included",
        "validation loss, nats/token",
        "Decayed ends: below scratch's line is cheaper than scratch",
    )
    _finish(
        speedups,
        "tokens a parameter",
        "S: scratch's FLOPs for the same loss / own FLOPs",
        "What each end is worth: above 1 is cheaper",
    )
    of_scratch = [row.point for row in rows if row.point.arm == SCRATCH]
    paid = sorted({round(point.paid / 1e12, 2) for point in of_scratch})
    losses.set_xticks(paid, [f"{cost:g}" for cost in paid])
    worth_drawing = [row.point for row in rows if row.speedup_included is not None]
    drawn = [point for point in worth_drawing if point.arm != SCRATCH]
    per_parameter = sorted({round(point.tokens_per_parameter) for point in drawn})
    speedups.set_xticks(per_parameter, list(map(str, per_parameter)))
    for axes in (losses, speedups):
        axes.minorticks_off()
        axes.margins(x=0.22 if named_at_ends else 0.05, y=0.12)
    if named_at_ends:
        _name(losses, at_losses)
        _name(speedups, at_speedups)
    else:
        handles, names = losses.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    sentence = answer(rows)
    lines = math.ceil(len(sentence) / TITLE_LETTERS)
    letters = min(TITLE_LETTERS, len(sentence) // lines + 12)  # a line, so that all are about as long
    title = "\n".join(textwrap.wrap(sentence, letters))
    figure.suptitle(title, fontsize=11.5, fontweight="bold", color=INK, x=0.01, ha="left")
    return figure


@dataclass(frozen=True)
class Label:
    """A text beside a point of the data."""

    across: float
    up: float
    text: str
    colour: str
    aligned: str = "left"  # at its left end, which is then beside the point


def _colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for each arm: black for scratch, for the others COLOURS in turn."""
    spare = itertools.cycle(COLOURS)
    colours = {SCRATCH: "#000000"}
    for arm in arms:
        if arm not in colours:
            colours[arm] = next(spare)
    return colours


def _plot_losses(axes: Axes, rows: Sequence[Worth], style: dict[str, Any]) -> Label:
    """Draw the ends of one line against what they cost; return its name, for the last of them."""
    points = [row.point for row in rows]
    costs = [point.paid / 1e12 for point in points]
    axes.plot(costs, [point.val_loss for point in points], **style)
    # what is cheaper than scratch lies left of its line: the name does too, and leaves the line free
    last = points[-1]
    side = "left" if last.arm == SCRATCH else "right"
    title = _title(rows[-1])
    return Label(costs[-1], last.val_loss, title, style["color"], side)


def _plot_speedups(axes: Axes, rows: Sequence[Worth], style: dict[str, Any]) -> Label | None:
    """Draw the speed-ups of one line against tokens a parameter; return its name, for the last of them."""
    across = [row.point.tokens_per_parameter for row in rows]
    up = [row.speedup_included or 0.0 for row in rows]
    bars = [row.interval_included or 0.0 for row in rows]
    axes.errorbar(across, up, yerr=bars, capsize=3, **style)
    if not rows:
        return None
    arm = rows[-1].point.arm
    return Label(across[-1], up[-1], arm, style["color"])


def _title(row: Worth) -> str:
    """An arm's name, and what its end is worth at least, where that is known."""
    arm = row.point.arm
    if arm == SCRATCH or not _least_speedup(row):
        return arm
    sign = "" if row.speedup_included is None else "= "
    return f"{arm}, S {sign}{_speedup(row.speedup_included, row.bound_included)}"


def _name(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each text beside its point, those above one another LINE points apart."""
    axes.autoscale_view()
    bottom, top = axes.get_ylim()
    inches = axes.bbox.height / axes.figure.dpi
    height = inches * 72 / (top - bottom)  # points a unit
    below = math.inf
    for label in sorted(labels, key=lambda label: -label.up):
        level = label.up * height
        lowered = min(level, below - LINE)
        aside = 8 if label.aligned == "left" else -8
        axes.annotate(
            label.text,
            (label.across, label.up),
            xytext=(aside, lowered - level),
            textcoords="offset points",
            ha=label.aligned,
            va="center",
            fontsize=9,
            color=label.colour,
            fontweight="bold",
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
        )
        below = lowered


def _finish(axes: Axes, across: str, up: str, title: str) -> None:
    limits = axes.dataLim
    if 0 < limits.x0 < limits.x1:
        axes.set_xscale("log")
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
