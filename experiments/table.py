"""A comparison as text: the cells every table shares, and the files comparison.csv, comparison.json and
table.md.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from outgrow.experiments.changes import Change, summary
from outgrow.experiments.compare import METHOD, UNLIKE, Comparison, Row, answer
from outgrow.experiments.cost import saving
from outgrow.experiments.runs import SCRATCH, Run
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import write_text

HEADER = (
    "arm",
    "peak lr",
    "step-0 loss",
    "final loss (95 %)",
    "n",
    "tokens to scratch's final",
    "FLOPs to it",
    "source excluded: S, saving",
    "source included: S, saving",
    "Δ loss at equal FLOPs (excl. / incl.)",
    "max |Δlogit|",
)
GRID_HEADER = (
    "arm",
    "peak lr",
    "step-0 loss",
    "final loss (95 %)",
    "n",
    "source excluded: S, saving",
    "source included: S, saving",
)
UNDEFINED = "–"
UNITS = {1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}
CHANGES = (
    "Against the arm that starts alike and is trained on plainly (each at its best learning rate, at equal "
    "tokens, paired by seed)"
)


def cells(row: Row) -> list[str]:
    """One row under HEADER, as a reader sees it in the terminal, in Markdown and in HTML."""
    cost = row.cost
    return [
        row.arm,
        f"{row.learning_rate:g}",
        f"{row.start_loss:.3f}",
        final_loss(row),
        str(row.n),
        UNDEFINED if cost.tokens is None else amount(cost.tokens),
        UNDEFINED if cost.flops_excluded is None else amount(cost.flops_excluded),
        ratio(row, "excluded"),
        ratio(row, "included"),
        f"{signed(cost.difference_excluded)} / {signed(cost.difference_included)}",
        UNDEFINED if row.receipt is None else f"{row.receipt:.2g}",
    ]


def grid_cells(row: Row) -> list[str]:
    """One row under GRID_HEADER; the best learning rate of an arm is marked."""
    named = dict(zip(HEADER, cells(row), strict=True))
    if row.best:
        named["peak lr"] += " ★"
    return [named[heading] for heading in GRID_HEADER]


def final_loss(row: Row) -> str:
    """The mean with its interval, or the word that one seed has none."""
    half = row.final_loss_interval
    spread = "(one seed)" if half is None else f"± {half:.3f}"
    return f"{row.final_loss:.3f} {spread}"


def ratio(row: Row, side: Literal["excluded", "included"]) -> str:
    """'1.70 ×, 41 ± 6 %': speed-up and saving with the source on one `side`.

    Or what there is instead of a ratio.
    """
    excluded = side == "excluded"
    cost = row.cost
    if cost.outcome == "not reached":
        return f"not reached, ends {signed(cost.difference_at_end)}"
    speedup = cost.speedup_excluded if excluded else cost.speedup_included
    if speedup is None:
        unknown = not excluded and row.source_flops is None
        return "source's cost unknown" if unknown else "starts below"
    has_interval = excluded and row.arm != SCRATCH
    interval = row.saving_interval if has_interval else None
    spread = "" if interval is None else f" ± {100 * interval:.0f}"
    percent = round(100 * (saving(speedup) or 0.0))
    text = f"{speedup:.2f} ×, {percent}{spread} %"
    return text.replace("-", "−")


def signed(difference: float | None) -> str:
    """A difference of losses with its sign, in nats; a dash where there is none."""
    if difference is None:
        return UNDEFINED
    return f"{difference:+.3f}".replace("-", "−")


def amount(value: float) -> str:
    """Tokens and FLOPs at three digits: 1.64 M, 48.2 T."""
    for limit, unit in UNITS.items():
        if abs(value) >= limit:
            digits = f"{value / limit:#.3g}".rstrip(".")
            return f"{digits} {unit}"
    return f"{value:.3g}"


def ledger_cells(row: Row) -> list[str]:
    """The cost of one run of this row: training, operator, source, total."""
    own = row.flops + row.operator_flops
    total = None if row.source_flops is None else own + row.source_flops
    source = [row.source_tokens, row.source_flops]
    training = [row.tokens, row.flops, row.operator_flops]
    costs = [*training, *source, total]
    amounts = ["unknown" if cost is None else amount(cost) for cost in costs]
    return [row.arm, *amounts]


CHANGE_HEADER = (
    "arm",
    "starts as",
    "differs in",
    "FLOPs of training",
    "Δ final loss (95 %)",
    "n",
    "the seeds tell",
)


def change_cells(change: Change) -> list[str]:
    """One row under CHANGE_HEADER."""
    spread = "" if change.interval is None else f" ± {change.interval:.3f}"
    return [
        change.arm,
        change.plain,
        ", ".join(change.settings),
        f"{change.flops:.2f} ×",
        signed(change.difference) + spread,
        str(len(change.seeds)),
        change.verdict,
    ]


LEDGER_HEADER = (
    "arm",
    "tokens trained",
    "FLOPs trained",
    "operator's FLOPs",
    "source's tokens",
    "source's FLOPs",
    "FLOPs in all",
)


def markdown(comparison: Comparison) -> str:
    """The block that READMEs carry: what differs beside the growth, the answer, the best of every arm, the
    grid if there is one, notes.
    """
    rows = list(map(cells, comparison.best_rows))
    best = markdown_table(HEADER, rows)
    finding = capital(answer(comparison))
    parts = [f"**{finding}.**", best]
    if comparison.differences:
        lines = [f"- {difference}" for difference in comparison.differences]
        listing = "\n".join(lines)
        parts.insert(0, f"**{UNLIKE}:**\n\n{listing}")
    if comparison.changes:
        effects = summary(comparison.changes)
        parts.insert(-1, f"**{effects}.**")
        parts += [
            f"{CHANGES}:",
            markdown_table(CHANGE_HEADER, [change_cells(change) for change in comparison.changes]),
        ]
    if len(comparison.rows) > len(comparison.best_rows):
        parts += [
            "The whole grid (★: the best of its arm):",
            markdown_table(GRID_HEADER, [grid_cells(row) for row in comparison.rows]),
        ]
    if comparison.notes:
        notes = [f"- {note}" for note in comparison.notes]
        parts.append("\n".join(notes))
    parts.append(
        f"Losses in nats/token. A tiny model's result is a tiny-scale result. Machine: {comparison.machine}.",
    )
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, bars in cells escaped."""
    rule = ["---"] * len(header)
    lines = map(_markdown_line, [header, rule, *rows])
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def capital(sentence: str) -> str:
    """The sentence with a capital, unless it begins with an arm's name."""
    return sentence.replace("no ", "No ", 1) if sentence.startswith("no ") else sentence


def flat_row(row: Row) -> dict[str, Any]:
    """A row as one level of plain values, at full precision: a line of comparison.csv."""
    fields = asdict(row)
    fields |= fields.pop("cost") | {
        "saving_excluded": row.cost.saving_excluded,
        "saving_included": row.cost.saving_included,
    }
    seeds = map(str, row.seeds)
    savings = map(repr, row.seed_savings)
    fields["seeds"] = " ".join(seeds)
    fields["seed_savings"] = " ".join(savings)
    return fields | {"n": row.n, "saving_excluded_interval": row.saving_interval}


def write_csv(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line for each row of the grid; an undefined number is an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        names = list(lines[0])
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything the table and the picture show, so that both can be made again without the runs."""
    return {
        "study": comparison.study,
        "answer": answer(comparison),
        "differences": list(comparison.differences),
        "rows": [flat_row(row) for row in comparison.rows],
        "changes": [asdict(change) | {"verdict": change.verdict} for change in comparison.changes],
        "left_out": [{"folder": item.folder.name, "reason": item.reason} for item in comparison.left_out],
        "notes": list(comparison.notes),
        "method": METHOD,
        "machine": comparison.machine,
        "runs": [_curve(run) for run in comparison.runs],
    }


def _curve(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "arm": run.arm,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        **asdict(run.curve),
    }


def write_json(comparison: Comparison, path: Path) -> None:
    """Indented, but each run's curve on one line: a file to read and to diff."""
    values = as_json(comparison)
    runs = ",\n  ".join(map(json.dumps, values["runs"]))
    without_runs = values | {"runs": []}
    frame = json.dumps(without_runs, indent=1, ensure_ascii=False)
    text = frame.replace('"runs": []', f'"runs": [\n  {runs}\n ]')
    path.write_text(f"{text}\n", encoding="utf-8")


BEGIN, END = "<!-- table: written by experiments, do not edit -->", "<!-- end of table -->"


def insert_table(readme: Path, table: str) -> None:
    """Replace what stands between the markers of `readme` by `table`.

    Raises UserError when the markers are not there once.
    """
    before, _, after = _block(readme)
    block = f"{BEGIN}\n{table.strip()}\n{END}"
    write_text(readme, f"{before}{block}{after}")


def check_markers(readme: Path) -> None:
    """Refuse a page that has no place for a table, before there is one.

    Raises UserError when the markers are not there once.
    """
    _block(readme)


def check_table(readme: Path, table: str) -> None:
    """Raise UserError naming the first line in which the table in `readme` is not the one the runs gave."""
    _, block, _ = _block(readme)
    lines = block.strip().splitlines()
    expected = table.strip().splitlines()
    pairs = itertools.zip_longest(lines, expected, fillvalue="nothing")
    for number, (line, other) in enumerate(pairs, start=1):
        if line != other:
            fault = f"{readme}: the table is not what the runs gave; its line {number}"
            raise UserError(f"{fault} is {line!r}, expected {other!r}. Write it with insert_table")


def _block(readme: Path) -> tuple[str, str, str]:
    """The text of `readme` before, between and after the markers.

    Raises:
        UserError: they are not there once each, in this order.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{readme}: cannot be read ({error}); the table goes there") from None
    counts = text.count(BEGIN), text.count(END)
    in_order = text.find(BEGIN) < text.find(END)
    if counts != (1, 1) or not in_order:
        raise UserError(
            f"{readme}: expected one line {BEGIN!r} and, below it, one line {END!r} around the table; add "
            "them, or choose a folder without a page",
        )
    before, rest = text.split(BEGIN)
    block, after = rest.split(END)
    return before, block, after
