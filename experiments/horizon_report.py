"""The report on a study's horizons, made of its ends: tables, page and records around its answer
(`horizon_answer`) and its picture (`horizon_picture`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

from outgrow.experiments.comparable import check_ends_comparable
from outgrow.experiments.ends import RECORD, End, each_once, end_of, read_ends, write_ends
from outgrow.experiments.horizon_answer import answer, seed_numbers, speedup_text
from outgrow.experiments.horizon_picture import draw
from outgrow.experiments.horizons import Point, SeedWorth, Worth, worths
from outgrow.experiments.publish import Writer, mirror, write_together
from outgrow.experiments.recovery import EPSILON, Recovery, recoveries
from outgrow.experiments.report import Page, render
from outgrow.experiments.report import table as html_table
from outgrow.experiments.rules import unheld, unrun
from outgrow.experiments.runs import SCRATCH, LeftOut, Run, read_runs
from outgrow.experiments.start_table import START_HEADINGS, START_NOTE, STARTED, start_cells
from outgrow.experiments.study_file import takes_source_as_there
from outgrow.experiments.table import UNDEFINED, write_csv

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
    rows = worths(ends)
    study = runs[0].study if runs else out.resolve().name
    source_paid = not takes_source_as_there(study)
    remarks = unheld(ends)
    if missing := unrun(study, ends):
        remarks.append(missing)
    block = markdown(rows, source_paid=source_paid)
    lines = list(map(flat_row, rows))

    def report(path: Path) -> None:
        picture = path.with_name(PICTURE)
        text = html(study, rows, picture, remarks, source_paid=source_paid)
        path.write_text(text, encoding="utf-8")

    writers: dict[str, Writer] = {
        TABLE: lambda path: path.write_text(block, encoding="utf-8"),
        PICTURE: lambda path: draw(rows, path, source_paid=source_paid),
        RECORD: lambda path: write_ends(path, ends),
        LINES: lambda path: write_csv(lines, path),
        REPORT: report,
    }
    paths = write_together(out, writers)
    if wandb:
        pictures = {"horizons": out / PICTURE}
        summary = {"answer": answer(rows, source_paid=source_paid)}
        mirror(study, lines, pictures, summary, PROJECT)
    notes = [folder.note for folder in left_out]
    files = [f"  {path}" for path in paths]
    return [block, *remarks, *notes, *files]


def read_inputs(inputs: Sequence[str]) -> tuple[list[Run], list[End], list[LeftOut]]:
    """The runs among `inputs`, all ends, those of records too, and the folders that are left out.

    Where some runs have horizons, those without are left out: the wildcard that gathers horizons gathers a
    source, or an arm with such a name, too.

    Raises:
        UserError: a folder is no run, a record is damaged, an end has not decayed, the runs are not
            comparable, or two ends of one point differ.
    """
    records = [name for name in inputs if name.endswith(".json")]
    folders = [name for name in inputs if name not in records]
    every_run, left_out = read_runs(folders) if folders else ([], [])
    of_horizons = [run for run in every_run if run.record.setting("schedule.horizons")]
    runs = of_horizons or every_run
    passed_over = [run for run in every_run if run not in runs]
    left_out += [LeftOut(run.folder, "no horizon: its schedule.horizons is empty") for run in passed_over]
    check_ends_comparable(runs)
    pairs: list[tuple[str, End]] = []
    for record in records:
        pairs += [(record, end) for end in read_ends(Path(record))]
    pairs += [(str(run.folder), end_of(run)) for run in runs]
    return runs, each_once(pairs), left_out


def markdown(rows: Sequence[Worth], *, source_paid: bool = True) -> str:
    """The block that READMEs carry: the answer, the best of every arm, every seed where there are several,
    the recovery of what grew inside its run, and what is known of the starts.
    """
    parts = [answer(rows, source_paid=source_paid), table(rows)]
    if seeds := seed_cells(rows):
        parts += [
            "Every seed, against scratch's runs of the same seed:",
            markdown_table(SEED_HEADINGS, seeds),
        ]
    if grown := recovery_cells(rows):
        parts += [RECOVERED, markdown_table(RECOVERY_HEADINGS, grown)]
    if started := start_cells(row.point for row in rows):
        parts += [f"{STARTED}. {START_NOTE}", markdown_table(START_HEADINGS, started)]
    stripped = [part.rstrip("\n") for part in parts]
    block = "\n\n".join(stripped)
    return f"{block}\n"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: arm and optimizer to the left, numbers to the right."""
    numbers = len(headings) - 2
    alignment = "|---|---|" + "---:|" * numbers
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (headings, *rows)]
    joined = [" | ".join(cells) for cells in escaped]
    heading, *body = [f"| {line} |" for line in joined]
    lines = "\n".join([heading, alignment, *body])
    return f"{lines}\n"


def table(rows: Sequence[Worth]) -> str:
    """A Markdown table, one row for each arm, optimizer and horizon.

    A star: the best rate is at the edge of its grid.
    """
    lines = list(map(cells, rows))
    return markdown_table(HEADINGS, lines)


def cells(worth: Worth) -> list[str]:
    """One row of the table, under HEADINGS."""
    point = worth.point
    is_scratch = point.arm == SCRATCH  # whose interval against itself says nothing
    star = "*" if point.at_edge else ""
    excluded = speedup_text(worth.speedup_excluded, worth.bound_excluded)
    if worth.interval_excluded is not None and not is_scratch:
        excluded += f" ± {worth.interval_excluded:.2f}"
    included = speedup_text(worth.speedup_included, worth.bound_included)
    if worth.interval_included is not None and not is_scratch:
        included += f" ± {worth.interval_included:.2f}"
    difference = _number(worth.difference, "{:+.4f}")
    if worth.difference_interval is not None and not is_scratch:
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
        excluded,
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
    points = [row.point for row in rows]
    measured = recoveries(points, SCRATCH)
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
    names = [field.name for field in fields(Worth)]
    values = {name: getattr(worth, name) for name in names}
    del values["point"]
    seeds = [str(seed.seed) for seed in worth.seeds]
    losses = [repr(seed.val_loss) for seed in worth.seeds]
    values["seeds"] = " ".join(seeds)
    values["seed_losses"] = " ".join(losses)
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


def html(
    study: str,
    rows: Sequence[Worth],
    picture: Path,
    remarks: Sequence[str] = (),
    *,
    source_paid: bool = True,
) -> str:
    """The page of a comparison of decayed ends. `picture` is a PNG file and goes in as data; `remarks` name
    the rules of a claim that the ends do not keep.
    """
    sentence = answer(rows, source_paid=source_paid)
    points = [row.point for row in rows]
    arms = sorted({point.arm for point in points})
    devices = sorted({end.device for point in points for end in point.ends})
    lines = list(map(cells, rows))
    parts = [
        f"<p><b>{escape(sentence)}</b></p>",
        "<h2>Each arm at its best learning rate and batch, at every horizon</h2>",
        html_table(HEADINGS, lines, [line[0] for line in lines]),
    ]
    if seeds := seed_cells(rows):
        parts += ["<h2>Every seed</h2>", html_table(SEED_HEADINGS, seeds)]
    if grown := recovery_cells(rows):
        explained = f"<p>{escape(RECOVERED)}</p>"
        parts += ["<h2>Recovery</h2>", explained, html_table(RECOVERY_HEADINGS, grown)]
    if started := start_cells(row.point for row in rows):
        explained = f"<p>{escape(START_NOTE)}</p>"
        parts += [f"<h2>{STARTED}</h2>", explained, html_table(START_HEADINGS, started)]
    if remarks:
        listed = [f"<li>{escape(remark)}</li>" for remark in remarks]
        items = "".join(listed)
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
        answer=sentence,
        parts=parts,
    )
    return render(page, picture)


def _number(value: float | None, form: str) -> str:
    return "out of range" if value is None else form.format(value)
