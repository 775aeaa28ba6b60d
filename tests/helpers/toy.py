"""A toy run that several files of tests train: its overrides, and what makes two runs the same."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from outgrow.model.base.errors import UserError
from outgrow.train.run.signals import Stopped
from outgrow.train.settings import Settings

SIZES = "hidden_size:16,intermediate_size:32,num_hidden_layers:1,num_attention_heads:2,num_key_value_heads:2"
TARGET = (
    f"target={{model_type:phi,vocab_size:300,max_position_embeddings:32,tie_word_embeddings:false,{SIZES}}}"
)
CLOCKS = ("seconds", "tokens_per_second")  # the only numbers that two equal runs may tell differently


def toy_overrides(folder: Path) -> list[str]:
    """A run of 6 steps of 8 windows of 16 tokens on a text of some sentences."""
    draw = random.Random(0)
    for i in range(40):
        words = (
            draw.choice(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs"])
            for _ in range(120)
        )
        (folder / f"{i}.txt").write_text(" ".join(words))
    data = [
        "data=files",
        f"data.path={folder}",
        f"data.folder={folder}-tokens",
        "data.vocab_size=280",
        "data.validation_fraction=0.3",
    ]
    sizes = [
        "context=16",
        "batch_tokens=128",
        "budget_tokens=768",
        "eval_tokens=320",
        "eval_every_tokens=256",
        "log_every_tokens=256",
    ]
    train = [f"train.{size}" for size in [*sizes, "save_every_tokens=384", "gradient_clip=0.5"]]
    return [
        *data,
        *train,
        "growth=scratch",
        TARGET,
        "logger=none",
        "progress=false",
        "study=t",
        "schedule.warmup_fraction=0.2",
    ]


def without_target(overrides: Sequence[str]) -> list[str]:
    """The overrides, to be given another target: keys and values of one key are given once."""
    return [override for override in overrides if not override.startswith("target=")]


def at(settings: Settings, out: Path, **train: Any) -> Settings:
    return dataclasses.replace(settings, out=str(out), train=dataclasses.replace(settings.train, **train))


def rows(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if kind in (None, row["kind"])]


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit-identical weights and metrics."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert timeless(folder) == timeless(other)


def assert_close_run(folder: Path, other: Path) -> None:
    """The same losses up to float32 rounding."""
    for ours, theirs in zip(timeless(folder), timeless(other), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value == (
                pytest.approx(theirs[key], rel=2e-5) if isinstance(value, float) else theirs[key]
            ), (ours["step"], key)


# ---- processes of their own --------------------------------------------------------------------------------

# Each is a fork of one that has imported everything and started no thread, so that it is there at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["outgrow.train.loop", "transformers.models.phi.modeling_phi"])


def begun(
    *runs: Settings, process: int = 0, processes: int = 1, port: int = 0, limit: int = resource.RLIM_INFINITY
) -> BaseProcess:
    """The runs, one after the other, in a process of their own; the first error is left in `<out>.error`.

    Args:
        processes: that train together, this being number `process`, and meet at `port`.
        limit: bytes that a file may have.
    """
    begun = FORKS.Process(target=_train, args=(runs, process, processes, port, limit))
    begun.start()
    return begun


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(condition: Callable[[], bool], process: BaseProcess, seconds: float = 600.0) -> None:
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.is_alive():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.0005)


def ended(*runs: Settings, processes: int = 1) -> Path:
    """The folder of the last run, all of them trained to their ends by so many processes, of one thread each:
    threads decide the bits."""
    port = free_port()
    started = [begun(*runs, process=i, processes=processes, port=port) for i in range(processes)]
    end = time.monotonic() + 600
    while (
        any(one.is_alive() for one in started)
        and not any(one.exitcode for one in started)
        and time.monotonic() < end
    ):
        time.sleep(0.01)
    codes = [one.exitcode for one in started]
    for one in started:
        one.kill()  # where one has failed, the others wait for it
        one.join()
    assert codes == [0] * processes, [
        path.read_text() for run in runs if (path := Path(f"{run.out}.error")).exists()
    ]
    return Path(runs[-1].out)


def _train(runs: Sequence[Settings], process: int, processes: int, port: int, limit: int) -> None:
    from outgrow.train import loop

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    torch.set_num_threads(1)
    if processes > 1:
        ranks = {
            "RANK": process,
            "LOCAL_RANK": process,
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
        }
        os.environ |= {key: str(value) for key, value in ranks.items()} | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    for settings in runs:
        try:
            loop.train(settings)
        except (UserError, Stopped) as error:
            Path(f"{settings.out}.error").write_text(str(error))
            sys.exit(error.status if isinstance(error, Stopped) else 2)
