"""Two revisions held against each other: what differs is named, and nothing of it stays behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from outgrow.experiments import same
from outgrow.experiments.__main__ import main
from outgrow.model.base.errors import UserError

ROOT = Path(same.__file__).resolve().parents[1]


def worktrees() -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "list"], capture_output=True, text=True, check=False
    ).stdout


@pytest.fixture(autouse=True)
def in_a_clone() -> None:
    if not worktrees():
        pytest.skip("no git, or no clone")


def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {
        "there": {"plan of tile": "a", "gone": "1", "loss": "2.5"},
        ROOT.name: {"plan of tile": "b", "fresh": "2", "loss": "2.5"},
    }
    monkeypatch.setattr(same, "_numbers_of", lambda tree, work: numbers[tree.name])
    before = worktrees()
    assert main(["same", "HEAD"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "fresh: none at HEAD, 2 here",
        "gone: 1 at HEAD, none here",
        "plan of tile: a at HEAD, b here",
        "1 of 4 numbers are the same to the bit as at HEAD",
    ]
    assert worktrees() == before


def test_a_revision_that_is_none_is_told() -> None:
    with pytest.raises(UserError, match=r"same nowhere: git says: .*give a commit of this clone"):
        same.compare("nowhere")


@pytest.mark.slow
def test_plans_weights_and_losses_are_among_the_numbers(tmp_path: Path) -> None:
    same.write_text(tmp_path / "text")
    numbers = same._numbers_of(ROOT, tmp_path)
    assert {
        "plan of lossless",
        "weights of tile",
        "train of source, step 4",
        "eval of grown, step 0",
        "final weights of grown",
    } <= numbers.keys()
    assert len(set(numbers.values()) - {"refused"}) > 40
