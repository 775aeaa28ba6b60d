"""The dtype of a run's final weights (train.save_dtype): what is stored, what stays, and a complete run that
is asked for another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.toy import at, timeless, weights
from outgrow.model.base.errors import UserError
from outgrow.model.twin import tiny_twin
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.corpus import prepare
from outgrow.train.run.export import write_model
from outgrow.train.settings import Settings
from outgrow.train.start.neutral import is_neutral
from outgrow.train.start.rehearsal import rehearse_end
from outgrow.train.step import Step


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose final weights are in float32. Read only."""
    return loop.train(at(settings, tmp_path_factory.mktemp("runs") / "float32"))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "final/config.json").read_text())


def assert_rounded(folder: Path, exact: Path, dtype: str) -> None:
    """The final weights are those of `exact`, rounded once to `dtype`, and so says the config."""
    stored, trained = weights(folder), weights(exact)
    assert trained.keys() == stored.keys()
    for name, tensor in trained.items():
        assert stored[name].dtype == getattr(torch, dtype)
        assert torch.equal(stored[name], tensor.to(getattr(torch, dtype))), name
    assert (config_of(folder)["dtype"], config_of(folder)["torch_dtype"]) == (dtype, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_final_weights_are_those_that_were_trained_rounded_once(
    settings: Settings, finished: Path, tmp_path: Path, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = loop.train(at(settings, tmp_path / "run", save_dtype=dtype))
    assert_rounded(folder, finished, dtype)
    assert timeless(folder) == timeless(finished)
    assert sorted(path.name for path in (folder / "final").iterdir()) == sorted(
        path.name for path in (finished / "final").iterdir()
    )
    assert AutoModelForCausalLM.from_pretrained(folder / "final").dtype == getattr(torch, dtype)
    assert (
        f"| weights | {dtype}; the losses are those of the float32 weights"
        in (folder / "final/README.md").read_text()
    )
    assert "| weights |" not in (finished / "final/README.md").read_text()


@pytest.mark.slow
def test_a_complete_run_gives_its_weights_in_another_dtype_and_keeps_the_rest(
    settings: Settings, finished: Path, tmp_path: Path
) -> None:
    folder = loop.train(at(settings, tmp_path / "run", keep_optimizer=True))
    loop.train(at(settings, folder, save_dtype="bfloat16"))
    assert_rounded(folder, finished, "bfloat16")
    assert (folder / "final/optimizer.pt").is_file()  # which nobody has asked to drop
    stamp = (folder / "final/model.safetensors").stat().st_mtime_ns
    for same in ("bfloat16", None):  # null asks for nothing else than there is
        loop.train(at(settings, folder, save_dtype=same))
        assert (folder / "final/model.safetensors").stat().st_mtime_ns == stamp
    loop.train(at(settings, folder, save_dtype="float32"))
    assert all(tensor.equal(weights(finished)[name]) for name, tensor in weights(folder).items())
    assert timeless(folder) == timeless(finished)


@pytest.mark.slow
def test_the_sources_dtype_is_that_of_its_tensors_and_outlives_it(
    overrides: list[str], phi_config: dict[str, Any], checkpoint_maker: Any, tmp_path: Path
) -> None:
    source = checkpoint_maker(tmp_path / "source", phi_config | {"vocab_size": 300}, "bfloat16")
    text = [given for given in overrides if not given.startswith("target=")]
    asked = [
        *text,
        f"source={source}",
        "growth=lossless",
        "target={num_hidden_layers:4}",
        "train.budget_tokens=256",
    ]
    settings = at(compose(asked), tmp_path / "run")
    folder = loop.train(settings)
    assert json.loads((folder / "run.json").read_text())["start"]["source_dtype"] == "bfloat16"
    assert weights(folder)["model.final_layernorm.weight"].dtype == torch.float32
    source.rename(tmp_path / "gone")
    loop.train(at(settings, folder, save_dtype="source"))
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    with pytest.raises(
        UserError, match=r"train\.save_dtype=source: there is no source; give float32, bfloat16 or float16"
    ):
        compose([*overrides, "train.save_dtype=source"])


def test_what_a_class_keeps_in_float32_is_stored_so(settings: Settings, tmp_path: Path) -> None:
    model = tiny_twin({"model_type": "deepseek_v3"}).build()
    write_model(tmp_path, model, None, prepare(settings.data, progress=False), "bfloat16")
    stored = load_file(tmp_path / "model.safetensors")
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide
    assert all(name.endswith("e_score_correction_bias") for name in wide)
    assert {tensor.dtype for name, tensor in stored.items() if name not in wide} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_another_dtype_is_rehearsed_too(settings: Settings, sharded: bool) -> None:
    data = prepare(settings.data, progress=False)
    for model_type in (
        "gpt2",
        "mixtral",
        "gemma3_text",
    ):  # a tied head, experts that are stored one by one, two kinds of layers
        assert rehearse_end({"model_type": model_type}, None, data, sharded=sharded, dtype="bfloat16") == []


def test_weights_beyond_the_range_of_the_dtype_are_refused(settings: Settings, tmp_path: Path) -> None:
    model = tiny_twin({"model_type": "gpt2"}).build()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = 1e5
    with pytest.raises(
        UserError,
        match=(
            r"train.save_dtype: transformer.ln_f.weight hold values beyond the range of float16; use "
            r"bfloat16"
        ),
    ):
        write_model(tmp_path, model, None, prepare(settings.data, progress=False), "float16")


def test_a_complete_run_is_rounded_from_its_end_and_not_trained_again(
    settings: Settings, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, folder := tmp_path / "run")
    # as where train.save_every_tokens=null wrote none
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    monkeypatch.setattr(loop, "build_objects", None)
    loop.train(at(settings, folder, save_dtype="bfloat16"))
    assert_rounded(folder, finished, "bfloat16")
    trained = loop_free(tmp_path, settings, monkeypatch)
    assert {path.name: path.read_bytes() for path in (folder / "final").iterdir()} == {
        path.name: path.read_bytes() for path in (trained / "final").iterdir()
    }
    monkeypatch.setattr(loop, "build_objects", None)
    for asked in ({"save_dtype": "float32"}, {"keep_optimizer": True}):
        with pytest.raises(UserError, match="no checkpoint of it is left to train its end again from"):
            loop.train(at(settings, folder, **asked))
    assert_rounded(folder, finished, "bfloat16")


def loop_free(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run, trained with its end in bfloat16."""
    monkeypatch.undo()
    return loop.train(at(settings, tmp_path / "trained", save_dtype="bfloat16"))


@pytest.mark.slow
def test_a_weight_that_outgrows_the_dtype_stops_the_run_which_goes_on_in_another(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Step.__call__

    def growing(step: Step, i: int) -> tuple[float, ...]:
        found = trained(step, i)
        if i == 1:
            # the least that rounds to infinity
            next(iter(step.parameters.values())).data.flatten()[0] = 65520.0
        return found

    monkeypatch.setattr(Step, "__call__", growing)
    at_once = {"eval_every_tokens": 1, "save_every_tokens": 1}
    with pytest.raises(
        UserError,
        match=(
            r"train\.save_dtype: after step 2, .* hold values beyond the range of float16; the same "
            r"command with"
        ),
    ):
        loop.train(at(settings, tmp_path / "run", save_dtype="float16", **at_once))
    assert not (tmp_path / "run/final").exists()
    folder = loop.train(at(settings, tmp_path / "run", save_dtype="bfloat16", **at_once))
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}


def test_the_dtype_changes_no_result() -> None:
    assert is_neutral("train.save_dtype")
