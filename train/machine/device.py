"""One Accelerate session that leaves nothing behind, mixed precision, and what devices can do: peak FLOP/s,
memory and its bandwidth."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging

from outgrow.model.base.errors import UserError
from outgrow.model.base.machine import processor
from outgrow.train.machine.agreement import check_agreement
from outgrow.train.machine.allocator import keep_freed_memory
from outgrow.train.machine.attention import fast_mixed_attention
from outgrow.train.machine.distribute import open_accelerator

if TYPE_CHECKING:
    from outgrow.train.settings import ShardingSettings

# Dense bf16 matrix FLOP/s of one device, from the vendor's data sheets; the first whose words all occur in
# the device's own name counts, where nothing else in that name tells another product.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

MEMORY_GIB = {
    "A100-80GB": 80,
    "A100-40GB": 40,
    "A100": 80,
    "H100 NVL": 87,
    "H100": 80,
    "H200 NVL": 131,
    "H200": 131,
    "B200": 167,
    "L40S": 45,
    "L40": 45,
    "RTX 4090": 24,
    "RTX 3090": 24,
}

# Bytes/s between a device's memory and its cores, from the vendor's data sheets. An A100 whose name says no
# more is the one with 80 GB for SXM.
BANDWIDTH = {
    "B200": 8000e9,
    "H200 NVL": 4800e9,
    "H200": 4800e9,
    "H100 PCIe": 2000e9,
    "H100 NVL": 3900e9,
    "H100": 3350e9,
    "A100 PCIe 80GB": 1935e9,
    "A100 40GB": 1555e9,
    "A100": 2039e9,
    "L40S": 864e9,
    "L40": 864e9,
    "L4": 300e9,
    "A40": 696e9,
    "A10": 600e9,
    "RTX 4090": 1008e9,
    "RTX 3090": 936e9,
}

# words of a name that tell no product apart: the maker, the slot, the memory's kind, and its size as sold
NO_PRODUCT = re.compile(r"nvidia|geforce|tesla|gpu|pcie|sxm\d?|hbm\d?e?|(40|80|141)gb")


@contextmanager
def session(
    precision: str,
    sharding: ShardingSettings | None = None,
    hang_seconds: float | None = None,
    common_settings: Mapping[str, Any] | None = None,
) -> Iterator[Accelerator]:
    """An `Accelerator` for one run.

    Its process group and its singletons end with the block, also when the run fails.

    Args:
        hang_seconds: after which train/watch.py ends a run whose processes wait for one another; the
            library's own limit comes later.
        common_settings: settings that all processes must have in common.

    Raises:
        UserError: bf16 was asked for on a GPU that lacks it, or FSDP from Accelerate's launcher, or a process
            was given other settings.
    """
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    cpu = forced or not torch.accelerator.is_available()
    threads = torch.get_num_threads()
    generator = torch.random.get_rng_state()
    bars = logging.is_progress_bar_enabled()
    matmul = torch.get_float32_matmul_precision()
    _reset()
    if cpu:
        keep_freed_memory()
    # a bar for each model that is read or written would break up the run's own lines
    logging.disable_progress_bar()
    _join_processes(cpu, hang_seconds)
    _hold_backend(torch.device("cpu" if cpu else "cuda"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
        mixed_precision = _mixed_precision(precision, cpu)
        accelerator = open_accelerator(sharding, cpu=cpu, mixed_precision=mixed_precision)
    mixed = accelerator.mixed_precision == "bf16"
    if mixed and not cpu:
        # what autocast leaves in float32, the fused loss, is multiplied in TF32
        torch.set_float32_matmul_precision("high")
    attention = fast_mixed_attention() if mixed and cpu else nullcontext()
    try:
        if common_settings is not None:
            check_agreement(common_settings, signs(), accelerator.process_index, accelerator.num_processes)
        with attention:
            yield accelerator
        accelerator.end_training()
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        _reset()
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)
        torch.random.set_rng_state(generator)
        if bars:
            logging.enable_progress_bar()


_held: list[Any] = []  # the backend of the session's process group


def _hold_backend(device: torch.device) -> None:
    """Keep the process group's backend until the next session begins.

    The run's DDP module refers to the group too, and is freed after the group has ended. Were it the last to
    do so, it would wait for the backend's threads while it holds the interpreter's lock, for which such a
    thread may be waiting to let go of a tensor: for ever. A backend that is freed by Python itself gives the
    lock away first.
    """
    _held.clear()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.group.WORLD
        assert world is not None
        _held.append(world._get_backend(device))


_sessions = itertools.count()
_watches = itertools.count()
LIBRARY_S = 1800.0  # that torch.distributed waits at least


def _join_processes(cpu: bool, hang_seconds: float | None) -> None:
    """Start the process group of a distributed run under a name of its own, in a store that outlives it.

    In a sweep, the next run would else find this one's addresses in the launcher's store, or meet a store
    that ends with this run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        store, rank, world = _meeting_place()
        store = torch.distributed.PrefixStore(f"session-{next(_sessions)}", store)
        limit = None
        if hang_seconds is not None:
            limit = timedelta(seconds=max(LIBRARY_S, 2 * hang_seconds))
        torch.distributed.init_process_group(
            "gloo" if cpu else "nccl",
            store=store,
            rank=rank,
            world_size=world,
            timeout=limit,
        )


def signs() -> torch.distributed.Store | None:
    """A connection of its own to where the processes of this session meet, for train/watch.py.

    None for one process.
    """
    if not torch.distributed.is_initialized():
        return None
    store: Any = _meeting_place()[0]
    return torch.distributed.PrefixStore(f"signs-{next(_watches)}", store.clone())


@cache
def _meeting_place() -> tuple[torch.distributed.Store, int, int]:
    return next(torch.distributed.rendezvous("env://"))


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert not PartialState._shared_state


def _mixed_precision(precision: str, cpu: bool) -> str:
    able = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if precision == "bf16" and not cpu and not able:
        raise UserError(
            f"train.precision=bf16: {torch.cuda.get_device_name()} has no bf16; use train.precision=fp32",
        )
    mixes = precision == "bf16" or (precision == "auto" and able)
    return "bf16" if mixes else "no"


def device_name(device: torch.device) -> str:
    """The device's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor() if device.type == "cpu" else str(device)


def peak_flops(name: str, precision: str) -> float | None:
    """Dense bf16 FLOP/s of the device called `name`.

    None where it is not known, or the run does not compute in bf16.
    """
    if precision != "bf16":
        return None
    return named(PEAK_BF16_FLOPS, name)


def named(table: Mapping[str, float], name: str) -> float | None:
    """The entry of the first key whose words all occur in the device's own name; None where no key's do, or
    where another word is left over that may tell another product.

    `NVIDIA L40` is no L4, `RTX A1000` no A100, `RTX 3090 Ti` no RTX 3090, and a MIG slice, a virtual GPU or a
    laptop's chip is not the entire card.
    """
    words = _words(name)
    key = next((key for key in table if _words(key) <= words), None)
    if key is None or not all(map(NO_PRODUCT.fullmatch, words - _words(key))):
        return None
    return table[key]


def _words(name: str) -> set[str]:
    """The words and numbers of a device's name."""
    return set(re.findall(r"[a-z0-9]+", name.lower()))
