"""Checkpoints while training goes on: what is saved is the step that asked for it, and which checkpoints stay."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest
from toy import assert_same_run, at, rows

from train import loop, state, trainee
from train.settings import Budget, Settings, compose


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)


class Killed(BaseException):
    """Stands for a process that ends without warning."""


def test_a_checkpoint_written_late_holds_the_step_that_asked_for_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving waits until training has gone two steps on; the run that resumes from it ends like one that stood still to save."""
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
    evaluate, losses = trainee.evaluate, iter([9.0, 4.0, 5.0, 3.0, 6.0, 7.0])
    monkeypatch.setattr(trainee, "evaluate", lambda *a: type(evaluate(*a))(next(losses), 1.0))
    loop.train(at(settings, tmp_path / "run", keep_best=True, budget_tokens=1280, save_every_tokens=512))
    assert [(row["step"], row["val_loss"]) for row in rows(tmp_path / "run", "eval")][1:] == [(2, 4), (4, 5), (6, 3), (8, 6), (10, 7)]
    names = [path.name for path in state.complete(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000006", "step-00000008"]  # the best, and the newest of steps 4 and 8


def test_when_a_checkpoint_is_due(settings: Settings, tmp_path: Path) -> None:
    budget = Budget.of(at(settings, tmp_path, keep_best=True, save_every_tokens=384).train)
    assert [step for step in range(1, 7) if budget.saves(step, best=2)] == [2, 3]
    assert not budget.saves(6, best=6)  # after the last step there is the final model
