"""A derived schema printed as a file of model/families: read again, it is the family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import outgrow.model.family
from helpers.families import config_of as known
from helpers.models import make_checkpoint
from helpers.unwritten import TINY, config_of
from outgrow.growth.__main__ import main
from outgrow.growth.resolve import derived_family
from outgrow.growth.schema import family_text
from outgrow.model.build import to_hf_config
from outgrow.model.family import Family

MAMBA = {
    "hidden_size": 32,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "num_hidden_layers": 2,
    "n_groups": 1,
    "expand": 2,
}


def read_again(text: str, monkeypatch: Any) -> Family:
    """The family that a module's text registers."""
    registered: list[Family] = []
    monkeypatch.setattr(outgrow.model.family, "register", registered.append)
    exec(compile(text, "family.py", "exec"), {})
    (family,) = registered
    return family


@pytest.mark.parametrize(
    "config",
    [
        config_of("falcon"),
        config_of("gpt_oss"),
        config_of("mixtral"),
        config_of("bloom"),
        known("opt"),
        to_hf_config({"model_type": "mamba2", **TINY, **MAMBA}).to_dict(),
    ],
    ids=lambda config: config["model_type"],
)
def test_what_is_printed_is_the_family(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    family = derived_family(config)
    again = read_again(family_text(family), monkeypatch)
    assert again.lines == family.lines
    assert replace(again, schema="") == replace(family, schema="")


def test_the_command_prints_it(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "source", config_of("falcon"))
    main(["schema", f"source={folder}"])
    again = read_again(capsys.readouterr().out, monkeypatch)
    assert again.name == "falcon"
    assert "transformer.h.*.self_attention.dense" in [line.name for line in again.lines]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "source: missing"),
        (["sources=x"], "did you mean 'source'"),
        (["source=nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_cannot_be_printed_is_told_in_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["schema", *arguments])
    assert message in capsys.readouterr().err
