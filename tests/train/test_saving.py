"""Checkpoints while training goes on: what is saved is the step that asked for it, and which checkpoints
stay."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from helpers.toy import assert_same_run, at, rows
from outgrow.model.base.errors import UserError
from outgrow.train import loop, observing
from outgrow.train.compose import compose
from outgrow.train.run import state
from outgrow.train.run.record import Evaluation
from outgrow.train.settings import Budget, Settings


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)


class Killed(BaseException):
    """Stands for a process that ends without warning."""


@pytest.mark.slow
def test_a_checkpoint_written_late_holds_the_step_that_asked_for_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving waits until training has gone two steps on; the run that resumes from it ends like one that
    stood still to save."""
    moved, write, count = Event(), state.write, loop.Meter.count

    def late(*arguments: Any, **options: Any) -> None:
        assert moved.wait(60)
        write(*arguments, **options)

    def counted(self: loop.Meter, *arguments: Any) -> None:
        count(self, *arguments)
        if self.position.step == 5:
            moved.set()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state, "write", late)
        patch.setattr(loop.Meter, "count", counted)
        with pytest.raises(Killed):
            loop.train(at(settings, tmp_path / "late"))
    assert [path.name for path in state.complete(tmp_path / "late" / "checkpoints")] == ["step-00000003"]
    loop.train(at(settings, tmp_path / "late"))
    loop.train(at(settings, tmp_path / "still", save_async=False))
    assert_same_run(tmp_path / "late", tmp_path / "still")


def test_the_checkpoint_of_the_lowest_validation_loss_is_saved_when_it_is_measured_and_stays(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([9.0, 4.0, 5.0, 3.0, 6.0, 7.0])
    monkeypatch.setattr(observing, "evaluate", lambda *_: Evaluation(next(losses), 1.0))
    loop.train(at(settings, tmp_path / "run", keep_best=True, budget_tokens=1280, save_every_tokens=512))
    assert [(row["step"], row["val_loss"]) for row in rows(tmp_path / "run", "eval")][1:] == [
        (2, 4),
        (4, 5),
        (6, 3),
        (8, 6),
        (10, 7),
    ]
    names = [path.name for path in state.complete(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000006", "step-00000008"]  # the best, and the newest of steps 4 and 8


def test_when_a_checkpoint_is_due(settings: Settings, tmp_path: Path) -> None:
    budget = Budget.of(at(settings, tmp_path, keep_best=True, save_every_tokens=384).train)
    assert [step for step in range(1, 7) if budget.saves(step, best=2)] == [2, 3]
    assert not budget.saves(6, best=6)  # after the last step there is the final model


def bits_lost(checkpoint: Path) -> None:
    """As a disk loses them: the size stays."""
    file = next(checkpoint.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-100:-50] = bytes(50)
    file.write_bytes(raw)


@pytest.mark.slow
def test_the_newest_intact_checkpoint_is_taken_and_said_and_the_run_ends_as_ever(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = dataclasses.replace(at(settings, tmp_path / "run", save_every_tokens=128, keep=3), progress="lines")
    loop.train(at(settings, tmp_path / "whole", save_every_tokens=128, keep=3))
    killed_at(6, run, monkeypatch)
    for step in (4, 5):
        bits_lost(tmp_path / f"run/checkpoints/step-0000000{step}")
    (tmp_path / "run/metrics.jsonl").unlink()
    capsys.readouterr()
    loop.train(run)
    said = capsys.readouterr().out
    for step in (4, 5):
        assert f"step-0000000{step}.damaged is of no use, and the run goes on from step-00000003" in said
    assert "metrics.jsonl was cut, deleted or changed" in said
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    names = [path.name for path in state.complete(tmp_path / "run/checkpoints")]
    assert names == ["step-00000003", "step-00000004", "step-00000005"]  # the damaged ones count no more


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_set_aside_and_said(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with the same sizes, of another seed, copied in by mistake as the newest."""
    run = dataclasses.replace(at(settings, tmp_path / "run"), progress="lines")
    other = dataclasses.replace(at(settings, tmp_path / "other", save_every_tokens=128), seed=1)
    loop.train(at(settings, tmp_path / "whole"))
    killed_at(6, run, monkeypatch)
    killed_at(6, other, monkeypatch)
    name = "step-00000005"
    shutil.copytree(tmp_path / f"other/checkpoints/{name}", tmp_path / f"run/checkpoints/{name}")
    loop.train(run)
    said = capsys.readouterr().out
    assert "it is of another run" in said
    assert f"{name}.damaged is of no use, and the run goes on from step-00000003" in said
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_without_an_intact_checkpoint_does_not_begin_anew_unasked(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = at(settings, tmp_path / "run")
    killed_at(6, run, monkeypatch)
    bits_lost(tmp_path / "run/checkpoints/step-00000003")
    with pytest.raises(
        UserError,
        match=r"checkpoints: no checkpoint is intact; delete this folder .*\n  - checkpoint .*step-00000003",
    ):
        loop.train(run)


def killed_at(step: int, run: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train up to the step before this one, whose checkpoint is whole."""

    def counted(self: loop.Meter, *arguments: Any) -> None:
        if self.position.step == step - 1:
            raise Killed
        count(self, *arguments)

    count = loop.Meter.count
    with monkeypatch.context() as patch:
        patch.setattr(loop.Meter, "count", counted)
        with pytest.raises(Killed):
            loop.train(run)
