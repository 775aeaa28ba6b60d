"""Several processes: the losses of one, sharded or not, and checkpoints that any number of processes takes
up."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.toy import (
    assert_close_run,
    assert_same_run,
    at,
    begun,
    ended,
    free_port,
    rows,
    wait_for,
    weights,
)
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.machine.agreement import check_agreement, shared
from outgrow.train.run import state
from outgrow.train.run.signals import REQUEUE
from outgrow.train.settings import Settings

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


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_gives_the_losses_of_one(
    settings: Settings, sharded: Settings, tmp_path: Path, finished: Path, processes: int
) -> None:
    """8 windows: shared out evenly or not, in micro-batches or not, with the whole model everywhere or a part
    of it."""
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
        assert (
            type(AutoModelForCausalLM.from_pretrained(tmp_path / name / "final")).__name__ == "PhiForCausalLM"
        )


@pytest.fixture(scope="module")
def on_two(settings: Settings, sharded: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two processes, "none" and "full", each with a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("two")
    ended(at(settings, folder / "none"), at(sharded, folder / "full"), processes=2)
    return folder


def interrupted(folder: Path, copy: Path) -> Path:
    """A copy of a run's folder as it was between its checkpoint and its end."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("summary.json", "final"))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_checkpoint_of_two_processes_is_resumed_on_any_number(
    settings: Settings, sharded: Settings, tmp_path: Path, finished: Path, on_two: Path, processes: int
) -> None:
    kinds = {"none": settings, "full": sharded}
    runs = {
        (was, name): at(kind, interrupted(on_two / was, tmp_path / f"{was}-{name}"))
        for was in kinds
        for name, kind in kinds.items()
    }
    ended(*runs.values(), processes=processes)
    for (was, name), run in runs.items():
        folder = Path(run.out)
        if processes == 2 and was == name:
            assert_same_run(folder, on_two / was)  # to the bit
        assert_close_run(folder, finished)
        assert_close_weights(folder, finished)


@pytest.mark.slow
def test_each_process_holds_and_writes_its_part(on_two: Path) -> None:
    """Sharded, either file has half of every matrix; not sharded, the tensors are dealt out whole."""
    held = {}
    for name in ("none", "full"):
        files = sorted((on_two / name / "checkpoints" / "step-00000003").glob("shard-*.safetensors"))
        held[name] = [{key: tensor.shape for key, tensor in load_file(file).items()} for file in files]
    (first, second), whole = held["full"], {**held["none"][0], **held["none"][1]}
    assert not held["none"][0].keys() & held["none"][1].keys()
    matrices = [key for key, shape in whole.items() if len(shape) == 2]
    assert len(matrices) > 20
    assert all(
        first[key][0] + second[key][0] == whole[key][0] and first[key][0] == second[key][0]
        for key in matrices
    )


@pytest.mark.slow
def test_a_missing_part_of_a_checkpoint_is_told(sharded: Settings, tmp_path: Path, on_two: Path) -> None:
    folder = interrupted(on_two / "full", tmp_path / "run")
    sorted(folder.glob("checkpoints/*/shard-*"))[0].unlink()
    with pytest.raises(
        UserError, match=r"no checkpoint is intact; delete this folder .*\n.*step-00000003: cannot be loaded"
    ):
        loop.train(at(sharded, folder))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_another_number_goes_on(
    overrides: list[str], tmp_path: Path
) -> None:
    longer = compose(
        [*overrides, "train.budget_tokens=25600", "train.save_every_tokens=null", "sharding=full"]
    )
    run = at(longer, tmp_path / "run")
    port = free_port()
    both = [begun(run, process=i, processes=2, port=port) for i in range(2)]
    wait_for(
        lambda: (
            len(rows(tmp_path / "run", "train")) > 2
            if (tmp_path / "run" / "metrics.jsonl").exists()
            else False
        ),
        both[0],
    )
    os.kill(both[1].pid or 0, signal.SIGUSR1)
    for one in both:
        one.join(600)
    assert [one.exitcode for one in both] == [REQUEUE, REQUEUE]
    assert len(state.complete(tmp_path / "run" / "checkpoints")) == 1
    assert_close_run(ended(run), ended(at(longer, tmp_path / "whole")))


def test_fsdp_from_the_launcher_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="give sharding=full"):
        loop.train(at(settings, tmp_path / "run"))


def failed(*limits: int, run: Settings) -> str:
    """What the run says when it fails on processes that may write files of so many bytes; all of them have to
    end with status 2."""
    port = free_port()
    started = [
        begun(run, process=i, processes=len(limits), port=port, limit=limit) for i, limit in enumerate(limits)
    ]
    for one in started:
        one.join(600)
    assert [one.exitcode for one in started] == [2] * len(limits)
    return Path(f"{run.out}.error").read_text()


@pytest.mark.slow
def test_a_disk_that_one_process_finds_full_stops_all_and_leaves_the_earlier_checkpoint(
    sharded: Settings, tmp_path: Path, finished: Path, on_two: Path
) -> None:
    run = at(sharded, interrupted(on_two / "full", tmp_path / "run"), save_every_tokens=128)
    assert "step-00000004: could not be written (File too large)" in failed(
        resource.RLIM_INFINITY, 1000, run=run
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert_close_run(ended(run), finished)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_what_is_not_finite_stops_all_processes_with_the_last_good_state_saved(
    overrides: list[str], tmp_path: Path, sharding: str
) -> None:
    run = at(compose([*overrides, f"sharding={sharding}", "optimizer.learning_rate=1e36"]), tmp_path / "run")
    words = failed(resource.RLIM_INFINITY, resource.RLIM_INFINITY, run=run)
    found = re.match(
        r"step (\d): the loss is .*; not finite: .*\. The run stops here and has saved the state after "
        r"step (\d)",
        words,
    )
    assert found, words
    assert int(found[1]) == int(found[2]) + 1 > 1
    (saved,) = state.complete(tmp_path / "run" / "checkpoints")
    assert all(
        tensor.isfinite().all()
        for shard in saved.glob("*.safetensors")
        for tensor in load_file(shard).values()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"budget_tokens": 640}, "train.budget_tokens=640, not 768"),
        (
            {"context": 8, "save_every_tokens": 128},
            "train.context=8, not 16; train.save_every_tokens=128, not",
        ),
    ],
)
def test_processes_with_other_settings_all_end_with_what_differs(
    settings: Settings, tmp_path: Path, own: dict[str, int], told: str
) -> None:
    port = free_port()
    runs = [at(settings, tmp_path / "run"), at(settings, tmp_path / "run", **own)]
    both = [begun(run, process=i, processes=2, port=port) for i, run in enumerate(runs)]
    for one in both:
        one.join(600)
    assert [one.exitcode for one in both] == [2, 2]
    words = Path(f"{runs[0].out}.error").read_text()
    assert words.startswith(f"process 1 was started with other settings than process 0: {told}")
    assert not list((tmp_path / "run").glob("*"))


def test_processes_agree_whatever_each_has_of_its_own(settings: Settings) -> None:
    """Two threads stand for two processes."""
    store = torch.distributed.HashStore()
    elsewhere = dataclasses.replace(settings.data, folder="/scratch/tokens", path="/scratch/text")
    quiet = dataclasses.replace(settings, data=elsewhere, out="/scratch/run", progress=False)
    with ThreadPoolExecutor(2) as pool:
        asked = [(settings, 0), (quiet, 1)]
        told = [pool.submit(check_agreement, shared(given), store, process, 2) for given, process in asked]
        assert [one.result() for one in told] == [None, None]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda given: dataclasses.replace(given, seed=5), "seed=5, not 0"),
        (
            lambda given: dataclasses.replace(
                given, optimizer=dataclasses.replace(given.optimizer, learning_rate=0.1)
            ),
            "optimizer.learning_rate=0.1, not 0.003",
        ),
    ],
)
def test_settings_that_would_train_something_else_on_one_process_are_told_on_both(
    settings: Settings, change: Any, told: str
) -> None:
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(2) as pool:
        asked = [(settings, 0), (change(settings), 1)]
        both = [pool.submit(check_agreement, shared(given), store, process, 2) for given, process in asked]
        for one in both:
            with pytest.raises(UserError, match=f"process 1 .* than process 0: {told}; start every"):
                one.result()


class SlowToRead(torch.distributed.Store):
    """A store whose verdict arrives late."""

    def __init__(self, store: torch.distributed.Store, arrives: threading.Event) -> None:
        super().__init__()
        self.set, self.arrives, self.store = store.set, arrives, store

    def get(self, key: str) -> bytes:
        if key == "verdict":
            assert self.arrives.wait(60)
        return self.store.get(key)


def test_process_0_holds_the_store_until_every_other_has_read_the_verdict(settings: Settings) -> None:
    store, arrives = torch.distributed.HashStore(), threading.Event()
    other = dataclasses.replace(settings, seed=5)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(check_agreement, shared(settings), store, 0, 2)
        second = pool.submit(check_agreement, shared(other), SlowToRead(store, arrives), 1, 2)
        ended_too_soon = wait([first], timeout=0.3).done
        arrives.set()
        assert not ended_too_soon
        for one in (first, second):
            with pytest.raises(UserError, match="seed=5, not 0"):
                one.result()


@pytest.mark.slow
def test_dropout_is_the_same_on_any_number_of_processes(overrides: list[str], tmp_path: Path) -> None:
    """Where micro-batches are: each draws under a seed of its own."""
    given = compose([*overrides, "train.micro_batch=2"])
    given = dataclasses.replace(given, target={**given.target, "resid_pdrop": 0.5})  # type: ignore[dict-item]
    one, two = ended(at(given, tmp_path / "one")), ended(at(given, tmp_path / "two"), processes=2)
    assert_close_run(two, one)
