"""Checkpoints: everything a run needs to go on as if it had never stopped, on any number of processes.

checkpoints/step-00000400/
    shard-*.safetensors  one file for each process: its part of the weights (`model/NAME`, tied tensors once) and of the optimizer's state
                         (`optimizer/SLOT/NAME`), written by torch.distributed.checkpoint, which puts the parts together again
    state.json           step, clock and the open logging interval, readable, and the size of each shard

The text needs no state (batch i is a function of the seed and i), nor does the generator (it is seeded per step). metrics.jsonl is cut
back to the checkpoint, so that a resumed run's file equals an undisturbed one's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from model.errors import UserError
from model.whole import PARTIAL, partial_of
from train.files import telling_disk_faults, whole_folder, write_json, write_text
from train.optimizer import set_learning_rate

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a checkpoint of one process, which is no fault


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
    best_val_loss: float | None = None  # of the evaluations after step 0
    best_step: int | None = None
    stage: int = 0  # of the run, see train/stages.py
    skipped: int = 0  # steps whose loss or gradient was not finite


# ---- tensors --------------------------------------------------------------------------------------------------------------------------


def tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds, not copied: filling these tensors puts the run back in place.

    Args:
        objective: a network, or a `NextTokenLoss` of one; where it is sharded, this process's parts are given as `DTensor`s.
    """
    found: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in objective.state_dict(keep_vars=True).items():
        if id(tensor) not in names:  # a tied tensor counts once
            names[id(tensor)] = name.removeprefix("network.")
            found[f"model/{names[id(tensor)]}"] = tensor.detach()
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            found |= {f"optimizer/{part}/{names[id(parameter)]}": tensor for part, tensor in _plain(slot, value)}
    return found


def _plain(slot: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of one of torchao's kinds (8-bit optimizer state) as the plain tensors that it is made of."""
    if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
        for part in value.__tensor_flatten__()[0]:
            yield from _plain(f"{slot}.{part}", getattr(value, part))
    else:
        yield slot, value.detach()


def _materialise(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the optimizer's first step would make, in whatever form it keeps it; its values are of no use."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad()


# ---- writing and reading --------------------------------------------------------------------------------------------------------------


def write(path: Path, position: Mapping[str, Any], held: Mapping[str, Tensor], group: Any = None, *, main: bool = True) -> None:
    """Write a checkpoint, whole or not at all. Every process of `group` calls this with its own part.

    Args:
        position: `asdict` of where the run stands.
        held: of `tensors`, or a copy.
        group: a gloo group of all processes; None for one process.
        main: whether this process makes the folder.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    with telling_disk_faults(path), whole_folder(path) if main else nullcontext(partial_of(path)) as partial:
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with _first_fault():
            dcp.save(dict(held), storage_writer=writer, process_group=group, no_dist=group is None)
        if main:
            write_json(partial / STATE, {**position, "files": _sizes(partial)})


def read(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Fill `objective` and `optimizer` from the checkpoint at `path`, whatever processes wrote it, and return where it stands.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    with _telling_damage(path):
        position = peek(path)
        reader = HuggingFaceStorageReader(str(path))
        if any(key.startswith("optimizer/") for key in reader.read_metadata().state_dict_metadata):  # there is none before the first step
            _materialise(optimizer)
        with _first_fault():
            dcp.load(dict(tensors(objective, optimizer)), storage_reader=reader, no_dist=True)
    return position


def peek(path: Path) -> Position:
    """Where the checkpoint at `path` stands; its tensors are not read.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    with _telling_damage(path):
        record = json.loads((path / STATE).read_text())
        if (sizes := _sizes(path)) != record["files"]:
            raise ValueError(f"its files should be {record['files']}, and are {sizes}")
        return Position(**{key: value for key, value in record.items() if key != "files"})


@contextmanager
def _telling_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # several libraries report a damaged file in several ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {path}: cannot be loaded ({reason}); delete this folder to resume from the one before it") from error


@contextmanager
def _first_fault() -> Iterator[None]:
    """Raise what went wrong itself, where torch.distributed.checkpoint raises a list of what went wrong on each process."""
    try:
        yield
    except CheckpointException as gathered:
        raise next(iter(gathered.failures.values()))[0] from None


def _sizes(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))}


# ---- the folder of checkpoints --------------------------------------------------------------------------------------------------------


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step:08d}"


def complete(folder: Path, *, tidy: bool = False) -> list[Path]:
    """The whole checkpoints under `folder`, oldest first; `tidy` removes what a killed process left half-written."""
    if not folder.is_dir():
        return []
    for path in folder.glob(f"*{PARTIAL}") if tidy else ():
        shutil.rmtree(path, ignore_errors=True)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def drop_old(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints but the newest `keep` and that of step `best`."""
    for path in complete(folder)[:-keep]:
        if best is None or path != place(folder, best):
            os.rename(path, partial_of(path))  # so that one which a kill leaves half removed is not taken for whole
            shutil.rmtree(partial_of(path))


def cut_metrics(path: Path, step: int, stage: int = 0) -> None:
    """Drop every line of metrics.jsonl after `step` and its `stage`, and a last line that a kill left half-written."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if _belongs(line, step)]
    grown = [line for line in lines if json.loads(line)["kind"] == "growth"]  # the n-th tells how stage n begins
    write_text(path, "".join(line for line in lines if line not in grown[stage:]))


def _belongs(line: str, step: int) -> bool:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return False
    return line.endswith("\n") and row["step"] <= step
