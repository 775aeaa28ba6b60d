"""Run folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from outgrow.train.run.record import RunRecord, Start, TextRecord
from outgrow.train.settings import Settings

FLOPS_PER_TOKEN = 10.0
SOURCE = {"path": "runs/s/final", "tokens": 300, "flops": 1500.0, "val_loss": 4.0}


def fabricate(
    tmp: Path,
    arm: str,
    losses: list[float],
    *,
    seed: int = 0,
    rate: float = 1e-3,
    every: int = 100,
    source: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A run folder with one evaluation every `every` tokens, 10 FLOPs a token. `changes` are dotted entries
    of run.json."""
    folder = tmp / changes.pop("folder", f"st-{arm}-lr{rate:g}-s{seed}")
    folder.mkdir(parents=True)
    tokens = [every * i for i in range(len(losses))]
    settings = {
        "study": "st",
        "seed": seed,
        "name": folder.name,
        "out": str(folder),
        "growth": {"name": arm},
        "optimizer": {"learning_rate": rate},
        "train": {"eval_tokens": 64, "context": 8, "budget_tokens": tokens[-1]},
    }
    record: dict[str, Any] = {
        "study": "st",
        "arm": arm,
        "seed": seed,
        "settings": settings,
        "settings_hash": "c0ffee",
        "parameters": 1234,
        "flops_per_token": FLOPS_PER_TOKEN,
        "tokens_per_step": 50,
        "budget_tokens": tokens[-1],
        "data": {"fingerprint": "f00d"},
        "target_config": {"model_type": "phi", "hidden_size": 80},
        "start": {"lossless": None, "receipt": None, "operator_flops": 0.0, "source": source},
        "device": "a <test> machine",
        "threads": 1,
        "precision": "fp32",
        "versions": {"torch": "2.13.0"},
    }
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = record
        for parent in parents:
            node = node[parent]
        node[last] = value
    (folder / "run.json").write_text(json.dumps(record))
    flops = [RunRecord.read(folder / "run.json", "").planned_flops(t) for t in tokens]
    evaluations = [
        {"kind": "eval", "step": t // 50, "tokens": t, "flops": paid, "val_loss": x}
        for t, paid, x in zip(tokens, flops, losses, strict=True)
    ]
    noise = {"kind": "train", "step": 1, "tokens": 50, "loss": 9.0}
    summary = {
        "start_val_loss": losses[0],
        "final_val_loss": losses[-1],
        "bits_per_byte": 1.5,
        "tokens": tokens[-1],
        "seconds": 60.0,
    }
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in [evaluations[0], noise, *evaluations[1:]])
    )
    (folder / "summary.json").write_text(json.dumps(summary | {"flops": flops[-1]}))
    return folder


def record_of(settings: Settings, **measured: Any) -> RunRecord:
    """The record of a run that was not trained; `measured` are entries beside the settings."""
    counted = {
        "parameters": 1234,
        "flops_per_token": 2.0,
        "tokens_per_step": 10,
        "budget_tokens": 20,
        "precision": "fp32",
    }
    known = counted | {"start": Start(), "data": TextRecord("f00d"), "target_config": {}}
    return RunRecord.of(settings, **(known | measured))
