"""A run that starts from a growth learned on text: its cost, and the text that it must not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.toy import TARGET, rows, without_target
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.__main__ import _train
from outgrow.train.compose import compose

DEEPER = TARGET.replace("num_hidden_layers:1", "num_hidden_layers:2")


@pytest.fixture(scope="module")
def source(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final folder of a run. Read only."""
    return loop.train(compose([*overrides, f"out={tmp_path_factory.mktemp('runs') / 'source'}"])) / "final"


def arm(overrides: list[str], source: Path, *more: str) -> list[str]:
    own = [one for one in without_target(overrides) if not one.startswith("growth=")]
    learned = ["growth=least_squares", "growth.window=16", "growth.tokens=640", "transfer.optimizer=null"]
    return [*own, DEEPER, f"source={source}", *learned, *more]


def tokens_of(overrides: list[str]) -> str:
    return next(one for one in overrides if one.startswith("data.folder=")).partition("=")[2]


def validation_text(overrides: list[str], source: Path, folder: Path) -> Path:
    """A file with the beginning of the validation text."""
    from transformers import AutoTokenizer

    from outgrow.train.data.shards import open_data

    held = open_data(tokens_of(overrides)).validation.tokens[:2000].tolist()
    text = folder / "held.txt"
    text.write_text(AutoTokenizer.from_pretrained(source).decode(held))
    return text


@pytest.mark.slow
def test_a_run_starts_from_what_was_learned_and_pays_for_it(
    overrides: list[str], source: Path, tmp_path: Path
) -> None:
    asked = arm(overrides, source, f"growth.text={tokens_of(overrides)}", f"out={tmp_path / 'run'}")
    folder = loop.train(compose(asked))
    learned = json.loads((folder / "start" / "growth.json").read_text())["learned"]
    ledger = json.loads((folder / "final" / "ledger.json").read_text())
    assert ledger["operator_flops"] == learned["flops"] > 0
    before = json.loads((source.parent / "summary.json").read_text())["final_val_loss"]
    assert rows(folder, "eval")[0]["val_loss"] == pytest.approx(before, abs=0.05)


@pytest.mark.slow
def test_a_run_starts_from_predicted_layers_and_pays_for_them(overrides: list[str], tmp_path: Path) -> None:
    own = [one for one in without_target(overrides) if not one.startswith("growth=")]
    three, four = (TARGET.replace("num_hidden_layers:1", f"num_hidden_layers:{count}") for count in (3, 4))
    source = loop.train(compose([*own, three, "growth=scratch", f"out={tmp_path / 'source'}"])) / "final"
    asked = [*own, four, f"source={source}", "growth=lesa", "transfer.optimizer=null"]
    folder = loop.train(compose([*asked, f"out={tmp_path / 'run'}"]))
    learned = json.loads((folder / "start" / "growth.json").read_text())["learned"]
    ledger = json.loads((folder / "final" / "ledger.json").read_text())
    assert ledger["operator_flops"] == learned["flops"] > 0
    assert learned["matrices"] > 0


@pytest.mark.slow
def test_the_validation_text_is_refused(overrides: list[str], source: Path, tmp_path: Path) -> None:
    text = validation_text(overrides, source, tmp_path)
    with pytest.raises(UserError, match=r"growth.text .* is the text that the run validates on"):
        loop.train(compose(arm(overrides, source, f"growth.text={text}", f"out={tmp_path / 'run'}")))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"learns on text, and growth.text is missing"),
        ("nowhere", r"growth.text 'nowhere': no such file or folder"),
        ("EMPTY", r"is empty; give some thousands of words"),
        ("SHORT", r"tokens; give a text of at least"),
        ("HELD", r"is the text that the run validates on"),
    ],
    ids=str,
)
def test_a_dry_run_tells_what_is_wrong_with_the_text_beside_other_faults(
    overrides: list[str],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    words: str,
) -> None:
    if text in ("EMPTY", "SHORT"):
        (tmp_path / "text").write_text("" if text == "EMPTY" else "the cat sat")
        text = str(tmp_path / "text")
    if text == "HELD":
        text = str(validation_text(overrides, source, tmp_path))
    own = arm(overrides, source, f"growth.text={text or 'null'}", f"out={tmp_path / 'run'}")
    settings = compose([*own, "dry_run=true", "forecast.gpus=3"])
    with pytest.raises(UserError, match=words) as told:
        _train(settings)
    assert "forecast.gpus: 3 do not divide" in str(told.value)
    assert "2 faults" in str(told.value)
    good = arm(overrides, source, f"growth.text={tokens_of(overrides)}", f"out={tmp_path / 'run'}")
    _train(compose([*good, "dry_run=true"]))
    assert "steps" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_lesson_in_a_later_stage_is_refused(overrides: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"growth.stages.1..operator: least_squares learns at a cost of its own"
    ):
        compose(
            [
                *overrides,
                "growth=g_stack",
                "growth.stages=[{until:0.5,layers:0.5},{until:1.0,operator:least_squares}]",
            ]
        )
