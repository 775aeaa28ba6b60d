"""Runs that are stopped: killed at any moment, asked to stop, out of disk; each ends where an undisturbed run
ends."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.toy import assert_same_run, at, begun, ended, wait_for
from outgrow.model.base.errors import UserError
from outgrow.train import __main__ as door
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.run import state
from outgrow.train.run.folder import is_complete
from outgrow.train.run.signals import REQUEUE, Stopped, watched
from outgrow.train.settings import Settings

STEPS = 60


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    """60 steps with a checkpoint after each."""
    return compose(
        [*overrides, f"train.budget_tokens={STEPS * 128}", "train.save_every_tokens=128", "train.keep=2"]
    )


@pytest.fixture(scope="module")
def undisturbed(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ended(at(settings, tmp_path_factory.mktemp("runs") / "whole"))


def being_written(checkpoints: Path) -> bool:
    """Whether a checkpoint newer than all whole ones is there in part; older ones are being removed."""
    newest = max((path.name for path in state.complete(checkpoints)), default="")
    return any(path.name.removesuffix(".partial") > newest for path in checkpoints.glob("*.partial"))


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_with_the_bits_of_an_undisturbed_one(
    settings: Settings, undisturbed: Path, tmp_path: Path
) -> None:
    """Every other time while a checkpoint is being written; else at any moment, start-up included. A run that
    has ended begins anew."""
    draw, settings, checkpoints = (
        random.Random(0),
        at(settings, tmp_path / "run"),
        tmp_path / "run" / "checkpoints",
    )
    kills, half_written = 0, 0
    for attempt in range(60):
        if kills == 20:
            break
        there, process = set(state.complete(checkpoints)), begun(settings)
        if attempt % 2:
            time.sleep(draw.uniform(0.0, 0.6))
        else:
            wait_for(lambda: set(state.complete(checkpoints)) != there, process)  # noqa: B023
            time.sleep(draw.uniform(0.0, 0.02))
            wait_for(lambda: being_written(checkpoints), process)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        half_written += being_written(checkpoints)
        if is_complete(tmp_path / "run"):
            assert_same_run(tmp_path / "run", undisturbed)
            shutil.rmtree(tmp_path / "run")
    assert kills == 20
    assert half_written >= 3
    assert_same_run(ended(settings), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE), (signal.SIGINT, 130)]
)
def test_a_run_that_is_asked_to_stop_saves_its_last_step_and_goes_on_from_there(
    settings: Settings, undisturbed: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    folder, settings = tmp_path / "run", at(settings, tmp_path / "run", save_every_tokens=None)
    process = begun(settings)
    wait_for(
        lambda: (folder / "metrics.jsonl").exists() and "train" in (folder / "metrics.jsonl").read_text(),
        process,
    )
    os.kill(process.pid or 0, number)
    process.join()
    assert REQUEUE == 75
    assert process.exitcode == status
    (saved,) = state.complete(folder / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    assert 0 < step < STEPS
    assert (
        Path(f"{folder}.error").read_text() == f"stopped by {number.name} after step {step}, which is saved"
    )
    ended(settings)
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_signals_mean_again_what_they_meant_before_the_run(settings: Settings, undisturbed: Path) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with watched() as asked:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_signal_at_the_end_of_a_run_lets_it_end_and_nothing_begin_after_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next horizon, or the next point of a sweep, would else train on until it is killed."""
    publish = loop.publish

    def signalled(*arguments: Any, **options: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return publish(*arguments, **options)

    monkeypatch.setattr(loop, "publish", signalled)
    with pytest.raises(Stopped, match="stopped by SIGTERM at its end, which is complete") as stopped:
        loop.train(at(settings, tmp_path / "run", budget_tokens=256))
    assert stopped.value.status == REQUEUE
    assert is_complete(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_asks_for_the_same_command_again(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """While the text is prepared, say, or the source grows."""
    monkeypatch.setattr(door, "_run", lambda _: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        door.main()
    assert ended.value.code == REQUEUE
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_second_ctrl_c_does_not_wait() -> None:
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    try:
        with watched() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked() == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.slow
def test_a_disk_that_takes_no_more_stops_the_run_and_leaves_the_earlier_checkpoint_whole(
    settings: Settings, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = begun(at(settings, folder))
    wait_for(lambda: len(state.complete(folder / "checkpoints")) > 0, process)
    process.kill()
    process.join()
    newest = state.complete(folder / "checkpoints")[-1]
    size = max(path.stat().st_size for path in newest.iterdir())
    process = begun(at(settings, folder), limit=size - 1)
    process.join()
    assert process.exitcode == 2
    words = Path(f"{folder}.error").read_text()
    assert re.search(
        r"checkpoints/step-\d{8}: could not be written \(.*\); whatever was complete before is untouched: "
        r"free space",
        words,
    )
    assert state.complete(folder / "checkpoints")[-1] == newest
    assert not list((folder / "checkpoints").glob("*.partial"))
    ended(at(settings, folder))
    assert_same_run(folder, undisturbed)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"/proc/nowhere/run: could not be written \(.*\).*write elsewhere"):
        loop.train(at(settings, Path("/proc/nowhere/run")))
