"""The table of a suite: groups as in Phi-2's, published rows first, ours below them; and each benchmark by
itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outgrow.experiments.published import credits, read_rows
from outgrow.experiments.suite.evaluate import Evaluated
from outgrow.experiments.table import UNDEFINED
from outgrow.train.suite.suite import Suite, group_averages, load_suite

PUBLISHED = Path(__file__).with_name("published.yaml")
AVERAGED = "phi_2"  # the suite whose groups published averages are of


@dataclass(frozen=True)
class Published:
    """A row that others published, in percent."""

    name: str
    source: str
    note: str
    groups: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TableRow:
    """A row of the table: column → percent, None where nothing was measured."""

    name: str
    values: dict[str, float | None]
    ours: bool


def published() -> list[Published]:
    """All published rows."""
    return read_rows(Published, PUBLISHED)


def rows(suite: Suite, evaluated: Sequence[Evaluated], *, groups: bool) -> list[TableRow]:
    """Every row that has a value, by group or by benchmark; all of ours."""
    columns = columns_of(suite, groups=groups)
    listed = []
    for row in published():
        theirs = averages(row, suite) if groups else row.tasks
        values = {column: theirs.get(column) for column in columns}
        if any(value is not None for value in values.values()):
            listed.append(TableRow(row.name, values, ours=False))
    for each in evaluated:
        ours: Mapping[str, float | None] = each.groups if groups else each.scores
        name = f"{each.name} (local items)" if each.local else each.name
        values = {column: _percent(ours.get(column)) for column in columns}
        listed.append(TableRow(name, values, ours=True))
    return listed


def averages(row: Published, suite: Suite) -> dict[str, float | None]:
    """The group averages of a published row: as its source gives them where the suite's group is that of
    Phi-2's table, else the mean of the benchmarks that it published; None where it lacks one."""
    values = group_averages(suite, row.tasks)
    table = load_suite(AVERAGED)
    for group, average in row.groups.items():
        if members(suite, group) == members(table, group):
            values[group] = average
    return values


def members(suite: Suite, group: str) -> set[str]:
    """The benchmarks of a group."""
    return {task.task for task in suite.tasks if task.group == group}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def columns_of(suite: Suite, *, groups: bool) -> list[str]:
    """The groups of the suite, or its benchmarks, in order."""
    names = [task.group if groups else task.task for task in suite.tasks]
    return list(dict.fromkeys(names))


def markdown(suite: Suite, evaluated: Sequence[Evaluated]) -> str:
    """Both tables in Markdown, with what must be known to read them."""
    parts = [
        f"# {suite.name}",
        _table(suite, evaluated, groups=True),
        "## Each benchmark",
        _table(suite, evaluated, groups=False),
    ]
    limits = {each.limit for each in evaluated if each.limit is not None}
    notes = [
        "Percent. A group is the plain mean of its benchmarks, and has no number where one of them has none."
    ]
    reckoned = [row.name for row in published() if row.tasks and not row.groups]
    listed = ", ".join(reckoned)
    notes.append(f"{listed}: no source gives their group averages, so these are means like ours.")
    notes += [f"Ours: the first {limit} items of each benchmark." for limit in sorted(limits)]
    local: set[str] = set()
    for each in evaluated:
        local.update(each.local)
    if local:
        tasks = ", ".join(sorted(local))
        notes.append(
            f"Local items: {tasks} of ours were measured on local task files, which say nothing "
            "beside a published row. (A file that holds the benchmark's own items says so with "
            "metadata: {benchmark_items: true}.)"
        )
    pairs = [(row.name, f"{row.source}, {row.note}.") for row in published()]
    notes += credits(pairs)
    lines = [f"* {note}" for note in notes]
    parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _table(suite: Suite, evaluated: Sequence[Evaluated], *, groups: bool) -> str:
    """Groups as columns; the many benchmarks as lines."""
    columns = columns_of(suite, groups=groups)
    listed = rows(suite, evaluated, groups=groups)
    names = [f"**{row.name}**" if row.ours else row.name for row in listed]
    cells = [[_cell(row.values[column]) for column in columns] for row in listed]
    if groups:
        return _markdown(columns, names, cells)
    turned = list(zip(*cells, strict=True))
    return _markdown(names, columns, turned)


def _cell(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.1f}"


def _markdown(heads: Sequence[str], names: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, a name before each line."""
    heading = " | ".join(heads)
    lines = [f"| | {heading} |", "|---|" + "---:|" * len(heads)]
    for name, line in zip(names, cells, strict=True):
        row = " | ".join((name, *line))
        lines.append(f"| {row} |")
    return "\n".join(lines)


def as_json(suite: Suite, evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """Our rows of the table, of 1."""
    runs = [
        {
            "name": each.name,
            "scores": each.scores,
            "groups": each.groups,
            "limit": each.limit,
            "local": list(each.local),
        }
        for each in evaluated
    ]
    return {"suite": suite.name, "runs": runs}
