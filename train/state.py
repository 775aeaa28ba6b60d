"""Checkpoints: everything a run needs to go on as if it had never stopped.

checkpoints/step-00000400/
    model.safetensors   the weights (tied tensors once)
    optimizer.pt        the optimizer's state, loaded with weights_only
    state.json          step, clock and the open logging interval, readable

The text needs no state (batch i is a function of the seed and i), nor does the generator (it is seeded per step). metrics.jsonl is cut
back to the checkpoint, so that a resumed run's file equals an undisturbed one's.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from model.errors import UserError
from train.files import PARTIAL, whole_folder, write_json, write_text

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class Position:
    """Where a run stands, apart from its tensors."""

    step: int = 0  # steps done
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0  # training clock: no evaluation, no saving
    loss_sum: float = 0.0  # of the open logging interval
    loss_count: int = 0
    start_val_loss: float | None = None  # at step 0
    val_loss: float | None = None  # at the last evaluation
    bits_per_byte: float | None = None


def save(folder: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write the checkpoint of `position` under `folder`, whole or not at all, then drop all but the newest `keep`.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    path = folder / f"step-{position.step:08d}"
    with whole_folder(path) as partial:
        save_model(model, str(partial / MODEL))
        torch.save(optimizer.state_dict(), partial / OPTIMIZER)
        write_json(partial / STATE, asdict(position))
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def complete(folder: Path, *, tidy: bool = False) -> list[Path]:
    """The whole checkpoints under `folder`, oldest first; `tidy` removes what a killed process left half-written."""
    if not folder.is_dir():
        return []
    for path in folder.glob(f"*{PARTIAL}") if tidy else ():
        shutil.rmtree(path, ignore_errors=True)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Fill `model` and `optimizer` from the checkpoint at `path` and return where it stands.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    try:
        position = Position(**json.loads((path / STATE).read_text()))
        load_model(model, str(path / MODEL), strict=True)
        optimizer.load_state_dict(torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True))
    except Exception as error:  # four libraries report a damaged file in four ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {path}: cannot be loaded ({reason}); delete this folder to resume from the one before it") from error
    return position


def cut_metrics(path: Path, step: int) -> None:
    """Drop every line of metrics.jsonl after `step`, and a last line that a kill left half-written."""
    if path.exists():
        write_text(path, "".join(line for line in path.read_text().splitlines(keepends=True) if _belongs(line, step)))


def _belongs(line: str, step: int) -> bool:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return False
    return line.endswith("\n") and row["step"] <= step
