"""Checkpoints: everything a run needs to go on as if it had never stopped, on any number of processes.

checkpoints/step-00000400/
    shard-*.safetensors  one file for each process: its part of the weights (`model/NAME`, tied tensors once)
                         of the optimizer's state (`optimizer/SLOT/NAME`) and of the averaged weights
                         (`ema/NAME`), written by
                         torch.distributed.checkpoint, which puts the parts together again
    metrics.jsonl        the run's rows up to here: a resumed run's file begins as this one, whatever has
                         become of its own
    state.json           step, clock and the open logging interval, readable, the hash of its run's settings,
                         and size and SHA-256 of each file, its own record included

The text needs no state (batch i is a function of the seed and i), nor does the generator (it is seeded per
step). Before a run goes on, the bytes of its newest checkpoint are held against these checksums; one that is
damaged is set aside, and the newest intact one is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
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

from outgrow.model.base.atomic import PARTIAL, partial_of, remove
from outgrow.model.base.errors import UserError, first_line
from outgrow.model.base.files import telling_disk_faults, whole_folder, write_json, write_text
from outgrow.model.keys import without
from outgrow.train.optimizer import set_learning_rate
from outgrow.train.run.folder import METRICS
from outgrow.train.run.record import SIGNATURE, digest_of, signed

STATE, DAMAGED = "state.json", ".damaged"
_NAME = re.compile(r"step-(\d{8,})")
# a checkpoint of one process, which is no fault
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass
class Position:
    """The state of a run apart from its tensors: clocks, losses, and the open logging interval."""

    step: int = 0  # steps done
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0  # training clock: no evaluation, no saving
    loss_sum: float = 0.0  # of the open logging interval
    loss_count: int = 0
    grad_norm: float | None = None  # before clipping, of the last step that was not passed over
    # of the routers' load-balancing term over the same steps, where there is one
    router_sum: float | None = None
    start_val_loss: float | None = None  # at step 0
    val_loss: float | None = None  # at the last evaluation
    bits_per_byte: float | None = None
    ema_val_loss: float | None = None  # of the averaged weights, where there are any
    ema_bits_per_byte: float | None = None
    best_val_loss: float | None = None  # of the evaluations after step 0
    best_step: int | None = None
    # of the open logging interval, where the gradient noise scale is estimated: of |G|² and of tr(Σ)
    noise_gradient: float = 0.0
    noise_scatter: float = 0.0
    stage: int = 0  # of the run, see train/stages.py
    skipped: int = 0  # steps whose loss or gradient was not finite


# ---- tensors -----------------------------------------------------------------------------------------------


def tensors(
    objective: nn.Module, optimizer: torch.optim.Optimizer, averaged: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, not copied: filling them restores the run.

    Args:
        objective: a network, or a `NextTokenLoss` of one; where it is sharded, this process's parts are given
            as `DTensor`s.
        averaged: the averaged weights by the network's own names, where there are any.
    """
    contents: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for key, tensor in objective.state_dict(keep_vars=True).items():
        if id(tensor) not in names:  # a tied tensor counts once
            name = key.removeprefix("network.")
            names[id(tensor)] = name
            contents[f"model/{name}"] = tensor.detach()
    for parameter, slots in optimizer.state.items():
        name = names[id(parameter)]
        for slot, value in slots.items():
            for part, tensor in _plain(slot, value):
                contents[f"optimizer/{part}/{name}"] = tensor
    for name, tensor in (averaged or {}).items():
        contents[f"ema/{name}"] = tensor
    return contents


def _plain(slot: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of one of torchao's kinds (8-bit optimizer state) as the plain tensors that it is made of."""
    if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
        for part in value.__tensor_flatten__()[0]:
            yield from _plain(f"{slot}.{part}", getattr(value, part))
    else:
        yield slot, value.detach()


def _materialise(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the optimizer's first step would make, in whatever form it keeps it.

    Its values are of no use.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad()


# ---- writing and reading -----------------------------------------------------------------------------------


def write(
    path: Path,
    position: Mapping[str, Any],
    contents: Mapping[str, Tensor],
    group: Any = None,
    *,
    main: bool = True,
    metrics: str = "",
    run: str | None = None,
) -> None:
    """Write a checkpoint atomically: all of it or nothing.

    Every process of `group` calls this with its own part.

    Args:
        position: `asdict` of where the run stands.
        contents: of `tensors`, or a copy.
        group: a gloo group of all processes; None for one process.
        main: true on the process that makes the folder.
        metrics: the rows of metrics.jsonl so far, on the process that makes the folder.
        run: the hash of the run's settings.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder = whole_folder(path) if main else nullcontext(partial_of(path))
    with telling_disk_faults(path), folder as partial:
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        alone = group is None
        with _first_fault():
            dcp.save(dict(contents), storage_writer=writer, process_group=group, no_dist=alone)
        digests = _all_digests(partial, group)
        if main:
            write_text(partial / METRICS, metrics)
            digests[METRICS] = _digest(partial / METRICS)
            _sign(partial, {**position, "files": digests}, run)


def _sign(path: Path, record: Mapping[str, Any], run: str | None) -> None:
    """Write the record of a checkpoint, with its run's hash and its own."""
    owned = {**record, "run": run}
    write_json(path / STATE, signed(owned))


def adopt(path: Path, run: str) -> None:
    """Let the checkpoint at `path`, a copy of another run's, belong to a run; the other's keeps its own
    record."""
    record = _record(path)
    _sign(path, without(record, (SIGNATURE, "run")), run)


def _all_digests(partial: Path, group: Any) -> dict[str, dict[str, Any]]:
    """Size and checksum of each shard.

    Processes share out the reading, since one alone would take long over a large checkpoint.
    """
    shards = _shards(partial)
    if group is None:
        return {shard.name: _digest(shard) for shard in shards}
    process = torch.distributed.get_rank(group)
    processes = torch.distributed.get_world_size(group)
    own = {shard.name: _digest(shard) for shard in shards[process::processes]}
    gathered: list[Any] = [None] * processes
    torch.distributed.all_gather_object(gathered, own, group=group)
    digests: dict[str, dict[str, Any]] = {}
    for part in gathered:
        digests |= part
    return digests


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
        return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def read(
    path: Path,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: Mapping[str, Tensor] | None = None,
) -> Position:
    """Fill `objective`, `optimizer` and the `averaged` weights from the checkpoint at `path`, whatever
    processes wrote it, and return where it stands.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    with _telling_damage(path):
        position = peek(path)
        reader = HuggingFaceStorageReader(str(path))
        keys = reader.read_metadata().state_dict_metadata
        if any(key.startswith("optimizer/") for key in keys):  # there is none before the first step
            _materialise(optimizer)
        state = tensors(objective, optimizer, averaged)
        with _first_fault():
            dcp.load(state, storage_reader=reader, no_dist=True)
    return position


def peek(path: Path) -> Position:
    """Read where the checkpoint at `path` stands; of its tensors, only the files' sizes are checked.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    with _telling_damage(path):
        record = _record(path)
        if folder_of(path.parent, record["step"]) != path:
            raise ValueError(f"it is the state after step {record['step']}, under another step's name")
        digests = record.pop("files")
        record = without(record, (SIGNATURE, "run"))
        sizes = {file.name: file.stat().st_size for file in _shards(path)}
        expected = {name: digest["bytes"] for name, digest in digests.items()}
        expected.pop(METRICS, None)
        if sizes != expected:
            raise ValueError(f"its files should be {expected}, and are {sizes}")
        return Position(**record)


def check(path: Path, process: int = 0, processes: int = 1, run: str | None = None) -> None:
    """Read the checkpoint at `path` and hold it against its checksums.

    Of several processes, each reads its share of the files.

    Args:
        run: the hash of the settings of the run that it has to belong to, if any.

    Raises:
        UserError: a file of it is missing or damaged, or it is another run's.
    """
    peek(path)
    with _telling_damage(path):
        record = _record(path)
        owner = record.get("run")  # older checkpoints do not tell
        if run is not None and owner not in (None, run):
            raise ValueError(f"it is of another run, with settings {owner[:12]}, not {run[:12]}")
        files = sorted(record["files"].items())
        for name, digest in files[process::processes]:
            if _digest(path / name) != digest:
                raise ValueError(f"the bytes of {name} are not those that were written")


def _record(path: Path) -> dict[str, Any]:
    record = json.loads((path / STATE).read_text())
    unsigned = without(record, (SIGNATURE,))
    if record[SIGNATURE] != digest_of(unsigned):
        raise ValueError(f"{STATE} is not what was written")
    return record


@contextmanager
def _telling_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # several libraries report a damaged file in several ways
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"checkpoint {path}: cannot be loaded ({reason})") from error


@contextmanager
def _first_fault() -> Iterator[None]:
    """Raise what went wrong itself, where torch.distributed.checkpoint raises a list of what went wrong on
    each process.
    """
    try:
        yield
    except CheckpointException as gathered:
        raise next(iter(gathered.failures.values()))[0] from None


# ---- the folder of checkpoints -----------------------------------------------------------------------------


def folder_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


def complete(folder: Path, *, tidy: bool = False) -> list[Path]:
    """The complete checkpoints under `folder`, oldest first.

    `tidy` removes what a killed process left half-written.
    """
    if not folder.is_dir():
        return []
    for path in folder.glob(f"*{PARTIAL}") if tidy else ():
        remove(path)
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    finished = [path for path in named if (path / STATE).is_file()]

    def step(path: Path) -> int:
        return int(path.name.removeprefix("step-"))

    return sorted(finished, key=step)


def drop_old(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints but the newest `keep` and that of step `best`."""
    for path in complete(folder)[:-keep]:
        if best is None or path != folder_of(folder, best):
            # so that one which a kill leaves half removed is not taken for whole
            dropped = partial_of(path)
            os.rename(path, dropped)
            remove(dropped)  # of a link, the link


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which it is none, and return that."""
    aside = path.with_name(path.name + DAMAGED)
    remove(aside)
    os.rename(path, aside)
    return aside


def restore_metrics(path: Path, saved: Path | None) -> bool:
    """Let metrics.jsonl hold what it held at the checkpoint `saved`, or nothing.

    Return whether rows of that had gone.
    """
    prefix = b"" if saved is None else (saved / METRICS).read_bytes()
    there = path.read_bytes() if path.is_file() else b""
    if there != prefix:
        write_text(path, prefix.decode())
    return not there.startswith(prefix)
