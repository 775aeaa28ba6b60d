"""Several processes: the losses of one, sharded or not, and checkpoints that any number of processes takes up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy import assert_close_run, at, ended, weights
from transformers import AutoModelForCausalLM

from train.settings import Settings, compose

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # of weights after six steps in float32


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)


@pytest.fixture(scope="module")
def sharded(overrides: list[str]) -> Settings:
    return compose([*overrides, "sharding=full"])


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ended(at(settings, tmp_path_factory.mktemp("runs") / "one"))


def assert_close_weights(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=name, **TOLERANCE)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_gives_the_losses_of_one(
    settings: Settings, sharded: Settings, tmp_path: Path, finished: Path, processes: int
) -> None:
    """8 windows: shared out evenly or not, in micro-batches or not, with the whole model everywhere or a part of it."""
    runs = {
        f"{name}-{micro_batch}": at(kind, tmp_path / f"{name}-{micro_batch}", micro_batch=micro_batch)
        for name, kind in (("whole", settings), ("sharded", sharded))
        for micro_batch in (None, 1)
    }
    ended(*runs.values(), processes=processes)
    for name in runs:
        assert json.loads((tmp_path / name / "run.json").read_text())["processes"] == processes
        assert_close_run(tmp_path / name, finished)
        assert_close_weights(tmp_path / name, finished)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / name / "final")).__name__ == "PhiForCausalLM"
