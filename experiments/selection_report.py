"""The table, the record and the ledger of a selection (`selection.py`)."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from outgrow.experiments.cost import half_interval
from outgrow.experiments.standings import Rung, Selection
from outgrow.model.base.files import write_json, write_text

TABLE, RECORD, LEDGER = "table.md", "selection.json", "ledger.json"


def table(selection: Selection) -> str:
    """Markdown: where each candidate stood after each rung, what it cost, and the rank correlations."""
    tokens = [f"{rung.tokens:,} tokens" for rung in selection.rungs]
    heads = ["candidate", "right after growth", *tokens, "FLOPs", "of which learned"]
    numbers = len(heads) - 1
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * numbers]
    for one in selection.last:
        name = f"**{one.label}**" if one is selection.winner else one.label
        cells = [name, f"{fmean(one.start):.4f}"]
        cells += [_loss(rung, one.label) for rung in selection.rungs]
        cells += [f"{one.cost:.3g}", f"{sum(one.operator_flops):.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    for rung in selection.rungs:
        for out in rung.diverged:
            when = f"diverged before {rung.tokens:,} tokens"
            lines += ["", f"**{out.label}** {when} and is out: {out.reason}"]
    for row in selection.correlations:
        rho = "too few to rank" if row["spearman"] is None else f"{row['spearman']:+.2f}"
        lines += [
            "",
            f"rank correlation, {row['from']} → {row['to']}: {rho} ({row['candidates']} candidates)",
        ]
    ledger = selection.ledger
    seeds = len(selection.winner.losses)
    spent = f"choosing took {ledger['flops']:.3g} FLOPs, {ledger['losers_flops']:.3g} of them on what lost"
    judged = f"ties within 95 % over {seeds} seeds went to the cheaper one"
    if seeds == 1:
        judged = "one seed: no interval, so equal losses alone are ties; seeds=[0,1,2] shows what is chance"
    return "\n".join([*lines, "", spent, "", judged, ""])


def _loss(rung: Rung, label: str) -> str:
    """A candidate's mean loss after a rung and its interval; nothing where it was not there."""
    for one in rung.standings:
        if one.label == label:
            half = half_interval(one.losses)
            return f"{one.loss:.4f}" + ("" if half is None else f" ± {half:.4f}")
    return ""


def write(selection: Selection, out: Path) -> None:
    """The table, the record and the ledger of a selection."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / TABLE, table(selection))
    write_json(out / RECORD, selection.to_dict())
    write_json(out / LEDGER, selection.ledger)
