"""The table of costs: published rows first, ours below them, with what must be known to read them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from outgrow.experiments.footprint.footprint import CostSettings, Footprint, known_device
from outgrow.experiments.published import credits, read_rows
from outgrow.experiments.table import UNDEFINED, amount
from outgrow.model.geometry import flops_per_token
from outgrow.model.presets import preset
from outgrow.train.machine.inference import ALLOWANCE

PUBLISHED = Path(__file__).with_name("published.yaml")
HEADER = (
    "model",
    "parameters",
    "device",
    "GPU-hours",
    "largest micro-batch",
    "ms per token",
    "GB at the context",
    "context",
    "data, tokens",
    "trained on, tokens",
)


@dataclass(frozen=True)
class Published:
    """A row that others published, as printed there; None where no source that was read has it.

    Attributes:
        preset: the model's sizes.
        card_gpu_hours: by its model card, where that says another number than the table.
        card: what the card says.
    """

    name: str
    parameters: str
    device: str
    gpu_hours: str
    ms_per_token: str
    memory_gb: str
    context: int
    data_tokens: str | None
    tokens: str
    source: str
    note: str
    micro_batch: str | None = None
    preset: str | None = None
    card_gpu_hours: str | None = None
    card: str | None = None


def published() -> list[Published]:
    """All published rows."""
    return read_rows(Published, PUBLISHED)


def markdown(rows: Sequence[Footprint], settings: CostSettings) -> str:
    """The table in Markdown, with its conditions."""
    theirs = map(_published_cells, published())
    cells = [HEADER, *theirs, *map(_cells, rows)]
    heading, *lines = [f"| {' | '.join(row)} |" for row in cells]
    rule = "|---|---:|---|" + "---:|" * (len(HEADER) - 3)
    notes = [f"* {note}" for note in _notes(settings)]
    table = [heading, rule, *lines]
    return "\n".join(["# What it costs", "", *table, "", *notes]) + "\n"


def _published_cells(row: Published) -> list[str]:
    values = [
        row.name,
        row.parameters,
        row.device,
        row.gpu_hours,
        row.micro_batch,
        row.ms_per_token,
        row.memory_gb,
        f"{row.context:,}",
        row.data_tokens,
        row.tokens,
    ]
    return [UNDEFINED if value is None else value for value in values]


def _cells(row: Footprint) -> list[str]:
    """A row of ours: ≈ before a forecast, ≥ before a bound."""
    forecast = row.kind == "forecast"
    return [
        f"**{row.name}**",
        amount(row.parameters),
        row.device + " (forecast)" * forecast,
        _hours(row, "≈ " * forecast),
        UNDEFINED if row.micro_batch is None else f"≈ {row.micro_batch}",
        _number(row.ms_per_token, "≥ " * forecast),
        _number(row.memory_gb, "≈ "),
        f"{row.context:,}",
        UNDEFINED if row.data_tokens is None else amount(row.data_tokens),
        UNDEFINED if row.tokens is None else amount(row.tokens),
    ]


def _hours(row: Footprint, mark: str) -> str:
    own = row.gpu_hours
    everything = row.gpu_hours_in_all
    if own is None or everything is None or everything == own:
        return _number(own, mark)
    with_source = _number(everything, "")
    return f"{_number(own, mark)} ({with_source} with its source)"


def _number(value: float | None, mark: str) -> str:
    if value is None:
        return UNDEFINED
    digits = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{mark}{digits}"


def _notes(settings: CostSettings) -> list[str]:
    """The conditions of every number."""
    notes = [
        "≈ and ≥: forecast from the config and the device's data sheet. Without a mark: measured.",
        "GPU-hours ≈: the ledger's FLOPs / (the device's peak in bfloat16 × a utilisation of "
        f"{settings.mfu:g}); measured: seconds of the training clock × processes.",
        "Largest micro-batch ≈: windows of the context that one device trains at a time, by the memory "
        "forecast: AdamW, mixed precision in bfloat16, gradient accumulation, no checkpointing, no sharding.",
        "ms per token ≥: a lower bound for one sequence, bytes of weights and cache in float16 / the "
        "device's memory bandwidth; measured: greedy, until the context is full, the median after a "
        "warm-up, in float16 on a GPU and in float32 on a processor.",
        "GB at the context ≈: weights and the cache of a full context in float16, and "
        f"{ALLOWANCE / 1e9:g} GB for all else.",
    ]
    rows = published()
    twofold = [row for row in rows if row.card_gpu_hours is not None]
    pairs = [(row.name, f"{row.source}; {row.note}.") for row in rows]
    return notes + [_two_hours(row, settings.mfu) for row in twofold] + credits(pairs)


def _two_hours(row: Published, supposed: float) -> str:
    """Say which utilisation the hours of the table suppose, and which those of the model card."""
    assert row.preset is not None
    assert row.card_gpu_hours is not None
    peak = known_device(row.device).peak
    flops = _figure(row.tokens) * flops_per_token(preset(row.preset), row.context)
    hours_at_peak = flops / peak / 3600
    by_table = hours_at_peak / _figure(row.gpu_hours)
    by_card = hours_at_peak / _figure(row.card_gpu_hours)
    return (
        f"{row.name}'s hours are printed twice: {row.tokens} tokens are {flops:.3g} FLOPs, which its table's "
        f"{row.gpu_hours} hours take at {by_table:.0%} of the device's peak and its model card's "
        f"{row.card_gpu_hours} ({row.card}, of the same peak) at {by_card:.0%}; at {supposed:.0%}, as the "
        f"forecasts suppose, it would be {hours_at_peak / supposed:,.0f}. The card does not say whether its "
        "days are of computing alone."
    )


def _figure(printed: str) -> float:
    """The number that is printed with a unit: 1.5K, 150B."""
    units = {"K": 1e3, "B": 1e9}
    return float(printed[:-1]) * units[printed[-1]]


def as_csv(rows: Sequence[Footprint]) -> str:
    """Our rows, a column for each field; empty where there is no number."""
    text = io.StringIO()
    names = [field.name for field in fields(Footprint)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def as_json(rows: Sequence[Footprint], settings: CostSettings) -> dict[str, Any]:
    """Our rows and the published ones, with the conditions."""
    return {
        "context": settings.context,
        "mfu": settings.mfu,
        "allowance_bytes": ALLOWANCE,
        "rows": [asdict(row) for row in rows],
        "published": [asdict(row) for row in published()],
    }
