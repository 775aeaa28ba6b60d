"""The tokenizer that a run reads with, and what is said before trained weights read another's ids."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest

from helpers.toy import at, rows
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.corpus import prepare
from outgrow.train.data.tokenizer import has_tokenizer, save_tokenizer, tokenizer_identity, train_tokenizer
from outgrow.train.run.reading import loss_warnings, rate_warnings, reading, tokenizer_warnings
from outgrow.train.run.record import RunRecord
from outgrow.train.settings import Settings


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)


@pytest.fixture(scope="module")
def source(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained source, and its tokenizer: of other entries than the text's own, and fewer."""
    folder = tmp_path_factory.mktemp("source")
    final = loop.train(at(settings, folder / "run", budget_tokens=256, eval_every_tokens=None)) / "final"
    for file in final.iterdir():
        if file.name.startswith(("tokenizer", "special")):
            file.unlink()
    save_tokenizer(
        train_tokenizer(["zebras quack", "quack zebras"] * 9, vocab_size=266, model_max_length=32), final
    )
    return final


def trained_on(settings: Settings, source: Path, out: Path, **data: Any) -> Settings:
    growth = compose(["growth=source", "source=x"]).growth
    text = replace(settings.data, folder=None, name=str(out / "text"), **data)
    return replace(at(settings, out / "run"), growth=growth, source=str(source), data=text, progress="lines")


@pytest.mark.slow
def test_a_source_with_a_tokenizer_keeps_it_also_when_it_is_gone_later(
    settings: Settings, source: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    asked = trained_on(settings, copy, tmp_path)
    asked = replace(asked, data=replace(asked.data, folder=str(tmp_path / "tokens")))
    folder = loop.train(asked)
    assert tokenizer_identity(str(folder / "final")) == tokenizer_identity(str(source))
    run = json.loads((folder / "run.json").read_text())
    assert run["data"]["cut"] == {"tokenizer": str(copy), "folder": str(tmp_path / "tokens")}
    shutil.rmtree(copy)
    again = prepare(reading(asked, None, RunRecord.read(folder / "run.json", "")), progress=False)
    assert again.fingerprint == run["data"]["fingerprint"]


def test_the_tokens_of_another_tokenizer_lie_in_a_folder_of_their_own(
    settings: Settings, source: Path, tmp_path: Path
) -> None:
    asked = trained_on(settings, source, tmp_path)
    text = reading(asked, source, None)
    assert (text.tokenizer, str(text.home)) == (
        str(source),
        f"{asked.data.home}-{str(tokenizer_identity(str(source)))[:8]}",
    )


def test_a_leaf_leaves_tokens_of_another_tokenizer_where_they_are() -> None:
    data = compose(["growth=scratch", "target=tiny_source"]).data
    # a folder that is given would be built anew
    assert (data.folder, str(data.home)) == (None, "data/stdlib")


def test_tokens_that_the_source_was_trained_on_serve_as_they_are(settings: Settings, tmp_path: Path) -> None:
    data = prepare(settings.data, progress=False)
    own = shutil.copytree(data.tokenizer_folder, tmp_path / "source")
    asked = replace(settings, source=str(own))
    assert reading(asked, own, None) == settings.data
    assert prepare(reading(asked, own, None), progress=False).fingerprint == data.fingerprint


@pytest.mark.slow
def test_training_another_tokenizer_is_asked_for_and_warned_of(
    settings: Settings, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = trained_on(settings, source, tmp_path, tokenizer="train")
    assert reading(asked, source, None) == asked.data
    folder = loop.train(asked)
    assert tokenizer_identity(str(folder / "final")) == tokenizer_identity(
        str(prepare(settings.data, progress=False).tokenizer_folder)
    )
    said = capsys.readouterr().out
    assert "warning: data.tokenizer=train is not the tokenizer that the source" in said
    assert rows(folder, "eval")


def test_a_teacher_of_other_tokens_is_warned_of(settings: Settings, source: Path, tmp_path: Path) -> None:
    data = prepare(settings.data, progress=False)
    own = shutil.copytree(data.tokenizer_folder, tmp_path / "own")
    (warning,) = tokenizer_warnings(settings, None, data, source)
    assert warning.startswith(f"warning: the teacher {source} was trained with another tokenizer than")
    (tmp_path / "bare").mkdir()
    for teacher in (own, tmp_path / "bare", None):
        assert list(tokenizer_warnings(settings, None, data, teacher)) == []


def test_a_source_without_a_tokenizer_is_read_as_ever(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    assert not has_tokenizer(tmp_path / "bare")
    assert reading(settings, tmp_path / "bare", None) == settings.data


def test_a_tokenizer_that_cannot_be_loaded_names_the_way_out(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be loaded .*data\.tokenizer=train trains one"):
        reading(settings, tmp_path, None)


def test_a_first_loss_above_guessing_and_a_rate_of_tiny_models_deserve_a_line(settings: Settings) -> None:
    grown = replace(settings, growth=compose(["growth=lossless", "source=x", "target=tiny_target"]).growth)
    assert next(loss_warnings(grown, 6.0, 300)).startswith(
        "warning: the first validation loss, 6.000, is above ln 300 = 5.704"
    )
    assert list(loss_warnings(grown, log(300), 300)) == list(loss_warnings(settings, 6.0, 300)) == []
    assert next(rate_warnings(grown, 135_000_000)).startswith(
        "warning: optimizer.learning_rate=0.003 was found on models of one or two"
    )
    slow = replace(grown, optimizer=replace(grown.optimizer, learning_rate=2e-4))
    assert (
        list(rate_warnings(slow, 10**9))
        == list(rate_warnings(grown, 10**6))
        == list(rate_warnings(settings, 10**9))
        == []
    )
