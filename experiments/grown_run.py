"""The growth inside a run, as its metrics tell of it: the spike, and the tokens until it is over.

A run that grows on its way (`growth.stages`) logs its validation loss before and after the growth, and its
training loss all along. From these come the height of the spike and the tokens until the training loss is
back at its value before the growth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from outgrow.train.run.record import read_rows

WINDOW = 4  # rows of the training loss that are averaged, before the growth and after


@dataclass(frozen=True)
class Growth:
    """The last growth inside a run. Losses in nats per token."""

    tokens: int  # trained before it
    loss_before: float | None = None  # on the validation text; None in runs that did not take it
    loss_after: float | None = None
    over_tokens: int | None = None  # after it, until the training loss is back; None: never

    @property
    def spike(self) -> float | None:
        """The height of the spike: what the growth added to the validation loss."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before


@dataclass(frozen=True)
class MetricsRow:
    """A row of metrics.jsonl: its kind, where the run stood, and its loss."""

    kind: str
    tokens: int
    loss: float


def read_growth(metrics: Path, way_out: str) -> Growth | None:
    """The last growth that a run's metrics.jsonl tells of; None for a run that did not grow on its way.

    Raises:
        UserError: a line is damaged.
    """
    rows = read_rows(metrics, way_out, _metrics_row)
    grown = [row for row in rows if row.kind == "growth"]
    if not grown:
        return None
    after = grown[-1]
    earlier = [row for row in rows if row.kind == "before_growth"]
    before = [row.loss for row in earlier if row.tokens == after.tokens]
    training = [row for row in rows if row.kind == "train"]
    return Growth(
        tokens=after.tokens,
        loss_before=before[-1] if before else None,
        loss_after=after.loss,
        over_tokens=tokens_until_back(training, after.tokens),
    )


def _metrics_row(row: Any) -> MetricsRow | None:
    key = {"train": "loss", "growth": "val_loss", "before_growth": "val_loss"}.get(row["kind"])
    if key is None or row[key] is None:
        return None
    tokens = int(row["tokens"])
    loss = float(row[key])
    return MetricsRow(row["kind"], tokens, loss)


def tokens_until_back(training: Sequence[MetricsRow], growth: int) -> int | None:
    """Tokens after the growth until the training loss, over WINDOW rows, is at its value before it.

    None where it never is, or where no row lies before the growth.
    """
    before = [row.loss for row in training if row.tokens <= growth]
    after = [row for row in training if row.tokens > growth]
    if not before:
        return None
    level = fmean(before[-WINDOW:])
    for end in range(WINDOW, len(after) + 1):
        window = after[end - WINDOW : end]
        if fmean(row.loss for row in window) <= level:
            return window[-1].tokens - growth
    return None
