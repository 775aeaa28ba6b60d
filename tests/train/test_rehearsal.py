"""The end of a run, rehearsed on a tiny twin before anything is grown or trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from helpers.toy import at
from outgrow.model.base.errors import UserError
from outgrow.model.generation import FILE
from outgrow.model.twin import tiny_twin
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.corpus import prepare
from outgrow.train.machine.distribute import tied_again
from outgrow.train.run.export import write_model
from outgrow.train.settings import Settings
from outgrow.train.start import rehearsal
from outgrow.train.start.rehearsal import rehearse_end


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)


@pytest.mark.slow
def test_a_generation_config_that_contradicts_itself_trains_to_its_end(
    settings: Settings,
    phi_config: dict[str, Any],
    checkpoint_maker: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoint_maker(tmp_path / "source", phi_config | {"vocab_size": 300}, "float32")
    (source / FILE).write_text(json.dumps({"temperature": 0.6}))
    growth = dataclasses.replace(settings.growth, operator="source")
    settings = dataclasses.replace(settings, source=str(source), growth=growth, target=None, progress=True)
    folder = loop.train(at(settings, tmp_path / "run", budget_tokens=128))
    assert "do_sample: true is added" in capsys.readouterr().out
    assert json.loads((folder / "final" / FILE).read_text())["temperature"] == 0.6
    config = json.loads((folder / "final" / "config.json").read_text())
    assert (config["rope_theta"], config["partial_rotary_factor"], config["torch_dtype"]) == (
        10000.0,
        0.5,
        "float32",
    )


BREAKS: dict[str, tuple[str, Any]] = {
    "the weights come back under other names": ("write_model", lambda *given: _renamed(*given)),
    "the tokenizer does not load": ("AutoTokenizer", None),
    "the loaded model is another": ("load_model", lambda folder: tiny_twin_of_another_seed(folder)),
}


def _renamed(folder: Path, model: Any, weights: Any, data: Any, dtype: str) -> None:
    write_model(
        folder, model, {f"other.{name}": tensor for name, tensor in model.state_dict().items()}, data, dtype
    )


def tiny_twin_of_another_seed(folder: str) -> Any:
    from outgrow.model.build import load_model

    model = load_model(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.1)
    return model


@pytest.mark.parametrize("name", BREAKS)
def test_what_would_fail_at_the_end_fails_before_anything_is_written(
    name: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, *BREAKS[name])
    with pytest.raises(
        UserError,
        match=(
            "the end of this run, rehearsed on a tiny model of family 'phi' before anything is trained, fails"
        ),
    ):
        loop.train(at(settings, tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("name", ["xlstm", "git"])
def test_a_class_is_rehearsed_whatever_its_own_loss_and_cache_want(name: str, settings: Settings) -> None:
    """xLSTM's cache has other sizes than its tiny twin; GIT's loss takes the places of a picture off the
    text."""
    assert (
        rehearse_end({"model_type": name}, None, prepare(settings.data, progress=False), sharded=False) == []
    )


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_saved_once(
    settings: Settings,
    phi_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sharded: bool,
    tied: bool,
) -> None:
    kept = []
    monkeypatch.setattr(
        rehearsal,
        "write_model",
        lambda folder, *given: (write_model(folder, *given), kept.append(_names(folder))),
    )
    data = prepare(settings.data, progress=False)
    assert (
        rehearse_end(
            phi_config | {"model_type": "llama", "tie_word_embeddings": tied}, None, data, sharded=sharded
        )
        == []
    )
    assert ("lm_head.weight" in kept[0]) != tied


def _names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_whole_tensors_of_a_tied_network_are_one_again() -> None:
    model = tiny_twin({"model_type": "gpt2"}).build()
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = tied_again(copies, model)
    assert again.keys() == copies.keys()
    assert again["lm_head.weight"] is again["transformer.wte.weight"]
