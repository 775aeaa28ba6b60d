"""report.html: one file a reader can open anywhere.

Picture inside, no network, every number from the comparison.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from outgrow.experiments.changes import summary
from outgrow.experiments.compare import METHOD, UNLIKE, Comparison, answer
from outgrow.experiments.runs import NULL_CONTROL, SCRATCH, SOURCE
from outgrow.experiments.table import (
    CHANGE_HEADER,
    CHANGES,
    GRID_HEADER,
    HEADER,
    LEDGER_HEADER,
    amount,
    capital,
    cells,
    change_cells,
    grid_cells,
    ledger_cells,
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222;
       max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.55rem; line-height: 1.25; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
img { width: 100%; height: auto; } .wide { overflow-x: auto; } .quiet { color: #666; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: right; vertical-align: bottom; border-bottom: 2px solid #222; padding: .3rem .5rem;
     font-weight: 600; line-height: 1.25; }
td { text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; padding: .3rem .5rem; }
td:first-child, th:first-child { text-align: left; font-weight: 600; }
tr.scratch td { background: #f3f3f3; } tr.best td { font-weight: 600; }
"""
WORDS = [
    ("S", "speed-up: scratch's FLOPs to its final loss, over the arm's FLOPs to the same loss"),
    (
        "saving",
        "1 − 1/S, the share of scratch's FLOPs that need not be paid; not the same number as the speed-up",
    ),
    (
        "source excluded / included",
        "whether the arm also pays for the training of the checkpoint it started from",
    ),
    (
        "starts below",
        (
            "at scratch's final loss before the arm's first step: no ratio, which would be infinite, but "
            "the loss at equal FLOPs"
        ),
    ),
    (
        "max |Δlogit|",
        "the receipt: how far the grown model's logits are from the source's before the first step",
    ),
    (SCRATCH, "the target with the library's own initialisation"),
    (SOURCE, "the source itself, trained on for the same FLOPs: trained longer, not bigger"),
    (NULL_CONTROL, "the same with its norm scales × √(N/n): as a growth into units that nothing reads"),
]


@dataclass(frozen=True)
class Page:
    """The page of any comparison: a heading, a line about what was compared, the answer with its picture,
    then `parts` of HTML. `warning` stands above the picture.
    """

    study: str
    question: str
    about: str
    answer: str
    parts: Sequence[str]
    warning: Sequence[str] = ()


def render(page: Page, picture: Path) -> str:
    """The page as HTML. `picture` is a PNG file and goes in as data."""
    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(page.study)}</title>",
        f"<style>{STYLE}</style></head><body>",
        f"<h1>Study {escape(page.study)}: {escape(page.question)}</h1>",
        f'<p class="quiet">{escape(page.about)}</p>',
        *page.warning,
        f'<img alt="{escape(page.answer)}" src="data:image/png;base64,{image}">',
        *page.parts,
        "</body></html>\n",
    ]
    return "\n".join(lines)


def words(meanings: Sequence[tuple[str, str]]) -> str:
    """A list of words and what they mean."""
    entries = [f"<dt><b>{escape(word)}</b></dt><dd>{escape(meaning)}</dd>" for word, meaning in meanings]
    return f"<dl>{''.join(entries)}</dl>"


def html(comparison: Comparison, picture: Path) -> str:
    """The page of a comparison of costs. `picture` is a PNG file and goes in as data."""
    best = comparison.best_rows
    stars = ["best" if row.best else "" for row in comparison.rows]
    runs = ("run", "arm", "seed", "peak lr", "step-0 loss", "final loss", "minutes")
    parts = [
        "<h2>Each arm at its best learning rate</h2>",
        table(HEADER, [cells(row) for row in best], [row.arm for row in best]),
        _notes(comparison.notes),
        *_changes(comparison),
        "<h2>The words</h2>",
        words(WORDS),
        "<h2>The whole grid</h2>",
        table(GRID_HEADER, [grid_cells(row) for row in comparison.rows], stars),
        "<h2>The ledger: what one run paid</h2>",
        table(LEDGER_HEADER, [ledger_cells(row) for row in best]),
        "<h2>Every run</h2>",
        table(runs, _runs(comparison)),
        f"<h2>Method</h2><p>{escape(METHOD)}</p>",
        (
            f"<h2>Machine</h2><p>{escape(comparison.machine)}. Minutes belong to this machine; "
            "everything else is counted.</p>"
        ),
    ]
    page = Page(
        study=comparison.study,
        question="what did a grown start save?",
        about=what(comparison),
        answer=capital(answer(comparison)),
        parts=parts,
        warning=_differences(comparison.differences),
    )
    return render(page, picture)


def what(comparison: Comparison) -> str:
    """Describe what was compared, in a sentence or two."""
    record = comparison.runs_of(comparison.scratch)[0].record
    arms = ", ".join(row.arm for row in comparison.best_rows)
    return (
        f"Study {comparison.study}: {len(comparison.runs)} complete runs of {len(comparison.best_rows)} "
        f"arms ({arms}). The target has {record.parameters:,} parameters and is trained on "
        f"{amount(record.budget_tokens)} tokens, {amount(record.flops_per_token)} FLOPs each. Losses in "
        "nats/token on held-out documents."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] | None = None) -> str:
    """An HTML table; `classes` name a class for each row."""
    head = _elements("th", header)
    lines = [_elements("td", row) for row in rows]
    names = classes or [""] * len(lines)
    pairs = zip(names, lines, strict=True)
    body = "".join(f'<tr class="{escape(name)}">{line}</tr>' for name, line in pairs)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _elements(tag: str, texts: Sequence[str]) -> str:
    """The texts, each as an HTML element."""
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _changes(comparison: Comparison) -> list[str]:
    if not comparison.changes:
        return []
    sentence = f"<p>{escape(summary(comparison.changes))}.</p>"
    rows = [change_cells(change) for change in comparison.changes]
    return [f"<h2>{escape(CHANGES)}</h2>", sentence, table(CHANGE_HEADER, rows)]


def _differences(differences: Sequence[str]) -> list[str]:
    if not differences:
        return []
    return [f"<p><b>{escape(UNLIKE)}:</b></p>", _notes(differences)]


def _notes(notes: Sequence[str]) -> str:
    return f"<ul>{_elements('li', notes)}</ul>" if notes else ""


def _runs(comparison: Comparison) -> list[list[str]]:
    runs = sorted(comparison.runs, key=lambda run: (run.arm, run.learning_rate, run.seed))
    return [
        [
            run.name,
            run.arm,
            str(run.seed),
            f"{run.learning_rate:g}",
            f"{run.curve.losses[0]:.4f}",
            f"{run.curve.losses[-1]:.4f}",
            f"{run.summary.seconds / 60:.1f}",
        ]
        for run in runs
    ]
