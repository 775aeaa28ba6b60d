"""The table of a suite: groups as in Phi-2's, published rows first, ours below them; and each benchmark by
itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from outgrow.experiments.suite.evaluate import Evaluated
from outgrow.train.suite.suite import Suite

PUBLISHED = Path(__file__).with_name("published.yaml")
NONE = "–"


@dataclass(frozen=True)
class Published:
    """A row that others published, in percent."""

    name: str
    source: str
    note: str
    groups: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, float] = field(default_factory=dict)


def published() -> list[Published]:
    """All published rows."""
    return [Published(**row) for row in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))]


def rows(
    suite: Suite, found: Sequence[Evaluated], *, groups: bool
) -> list[tuple[str, dict[str, float | None], bool]]:
    """(name, column → percent, ours) of every row that has a value, by group or by benchmark."""
    columns = columns_of(suite, groups=groups)
    theirs = [(row.name, row.groups if groups else row.tasks) for row in published()]
    told: list[tuple[str, dict[str, float | None], bool]] = [
        (name, {column: values.get(column) for column in columns}, False) for name, values in theirs
    ]
    for each in found:
        ours: Mapping[str, float | None] = each.groups if groups else each.scores
        name = f"{each.name} (local items)" if each.local else each.name
        told.append((name, {column: _percent(ours.get(column)) for column in columns}, True))
    return [row for row in told if row[2] or any(value is not None for value in row[1].values())]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def columns_of(suite: Suite, *, groups: bool) -> list[str]:
    """The groups of the suite, or its benchmarks, in order."""
    return list(dict.fromkeys(task.group if groups else task.task for task in suite.tasks))


def markdown(suite: Suite, found: Sequence[Evaluated]) -> str:
    """Both tables in Markdown, with what must be known to read them."""
    parts = [
        f"# {suite.name}",
        _table(suite, found, groups=True),
        "## Each benchmark",
        _table(suite, found, groups=False),
    ]
    limits = {each.limit for each in found if each.limit is not None}
    notes = [
        "Percent. A group is the plain mean of its benchmarks, and has no number where one of them has none."
    ]
    notes += [f"Ours: the first {limit} items of each benchmark." for limit in sorted(limits)]
    local = sorted({task for each in found for task in each.local})
    if local:
        notes.append(
            f"Local items: {', '.join(local)} of ours were measured on local task files, which say nothing "
            "beside a published row unless they hold the items that it was measured on."
        )
    sources: dict[tuple[str, str], list[str]] = {}
    for row in published():
        sources.setdefault((row.source, row.note), []).append(row.name)
    notes += [f"{', '.join(names)}: {source}, {note}." for (source, note), names in sources.items()]
    return "\n\n".join([*parts, "\n".join(f"* {note}" for note in notes)]) + "\n"


def _table(suite: Suite, found: Sequence[Evaluated], *, groups: bool) -> str:
    """Groups as columns; the many benchmarks as lines."""
    columns, told = columns_of(suite, groups=groups), rows(suite, found, groups=groups)
    names = [f"**{name}**" if ours else name for name, _, ours in told]
    cells = [
        [NONE if (value := values[column]) is None else f"{value:.1f}" for column in columns]
        for _, values, _ in told
    ]
    if not groups:
        names, columns, cells = columns, names, [list(line) for line in zip(*cells, strict=True)]
    lines = [f"| {name} | {' | '.join(line)} |" for name, line in zip(names, cells, strict=True)]
    return "\n".join([f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}", *lines])


def as_json(suite: Suite, found: Sequence[Evaluated]) -> dict[str, Any]:
    """What the table shows of ours, of 1."""
    runs = [
        {
            "name": each.name,
            "scores": each.scores,
            "groups": each.groups,
            "limit": each.limit,
            "local": list(each.local),
        }
        for each in found
    ]
    return {"suite": suite.name, "runs": runs}
