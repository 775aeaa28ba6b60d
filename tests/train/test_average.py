"""The average of the weights: its values, exactly restored, on several processes, and grown on the way."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.toy import assert_same_run, at, ended, rows, without_target
from outgrow.growth import grow
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.average import Average
from outgrow.train.compose import compose
from outgrow.train.run import state
from outgrow.train.run.record import Summary
from outgrow.train.settings import Settings, identity, settings_hash
from outgrow.train.step import Step

DECAY = 0.75


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose([*overrides, f"train.ema={DECAY}"])


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ended(at(settings, tmp_path_factory.mktemp("runs") / "one"))


def average(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "final_ema" / "model.safetensors")


def test_the_average_of_known_weights() -> None:
    """Weights 1, 2, 4 at decay 1/4: (1 + 2·3)/4 = 7/4, then (7/4 + 4·3)/4 = 55/16; all of them exact in float32."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    kept = Average(layer, dict(layer.named_parameters()), 0.25)
    for value in (2.0, 4.0):
        nn.init.constant_(layer.weight, value)
        kept.update()
    assert kept.tensors["weight"].item() == 55 / 16
    with kept.applied():
        assert (layer.weight.item(), kept.tensors["weight"].item()) == (55 / 16, 4.0)
    assert (layer.weight.item(), kept.tensors["weight"].item()) == (4.0, 55 / 16)
    kept.fill({"weight": torch.tensor([[3.0]])})
    assert (layer.weight.item(), kept.tensors["weight"].item()) == (4.0, 3.0)


def test_decay_and_half_life(overrides: list[str]) -> None:
    assert compose([*overrides, "train.ema=0.999"]).train.ema_decay == 0.999
    halved = compose([*overrides, "train.ema=1280"]).train.ema_decay  # ten steps of 128 tokens
    assert halved is not None
    assert halved**10 == pytest.approx(0.5)
    assert compose(overrides).train.ema_decay is None


@pytest.mark.parametrize("ema", ["0", "1", "-1", "127", "-0.5"])
def test_an_average_that_is_none_is_refused(overrides: list[str], ema: str) -> None:
    with pytest.raises(
        UserError, match=r"train\.ema: expected a decay of each step, between 0 and 1, or a half-life"
    ):
        compose([*overrides, f"train.ema={ema}"])


def test_runs_without_an_average_are_what_they_were(overrides: list[str]) -> None:
    """A run that was begun before there were averages goes on."""
    plain = compose(overrides)
    before = json.loads(json.dumps(dataclasses.asdict(plain)))
    del before["train"]["ema"], before["train"]["profile_steps"]
    assert settings_hash(before) == settings_hash(plain)
    assert identity(compose([*overrides, "train.ema=0.9"]))["train.ema"] == 0.9
    named = compose(["experiment=tiny", "growth=scratch", "train.ema=0.9"])
    assert named.name == "tiny-scratch-ema0.9-s0"


@pytest.mark.slow
def test_the_average_of_a_run_is_that_of_its_weights(
    settings: Settings, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain loop over the weights that each step left; the weights themselves learn as without."""
    left: list[dict[str, Tensor]] = []
    step = Step.__call__

    def spied(self: Step, i: int) -> tuple[float, ...]:
        if not left:
            left.append({name: weight.detach().clone() for name, weight in self.weights().items()})
        losses = step(self, i)
        left.append({name: weight.detach().clone() for name, weight in self.weights().items()})
        return losses

    monkeypatch.setattr(Step, "__call__", spied)
    folder = loop.train(at(settings, tmp_path / "run"))
    expected, *later = left
    for weights in later:
        expected = {name: DECAY * expected[name] + (1 - DECAY) * weights[name] for name in weights}
    for name, tensor in average(folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)

    monkeypatch.undo()
    plain = loop.train(at(compose(overrides), tmp_path / "plain"))
    for name, tensor in load_file(plain / "final" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(folder / "final" / "model.safetensors")[name])
    losses = [[row["val_loss"] for row in rows(run, "eval")] for run in (plain, folder)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_what_is_evaluated_is_what_final_ema_holds(
    finished: Path, settings: Settings, tmp_path: Path
) -> None:
    first, *_, last = rows(finished, "eval")
    assert first["ema_val_loss"] == first["val_loss"]
    assert last["ema_val_loss"] != last["val_loss"]
    summary = Summary.read(finished / "summary.json", "")
    assert (summary.ema_val_loss, summary.final_val_loss) == (last["ema_val_loss"], last["val_loss"])
    assert (
        json.loads((finished / "final_ema" / "ledger.json").read_text())["val_loss"] == summary.ema_val_loss
    )
    card = (finished / "final_ema" / "README.md").read_text()
    assert f"{summary.ema_val_loss:.4f} nats/token" in card
    assert "the weights averaged over the steps, decay 0.75 at each step" in card
    again = dataclasses.replace(
        compose_source(settings, finished / "final_ema"), out=str(tmp_path / "further"), study="further"
    )
    assert rows(loop.train(again), "eval")[0]["val_loss"] == pytest.approx(last["ema_val_loss"], rel=1e-6)


def compose_source(settings: Settings, source: Path) -> Settings:
    """The run that trains `source` on for a step."""
    growth = dataclasses.replace(settings.growth, name="source", operator="source")
    train = dataclasses.replace(settings.train, ema=None, budget_tokens=128)
    return dataclasses.replace(settings, growth=growth, train=train, source=str(source), target=None)


@pytest.mark.slow
def test_a_run_that_resumes_ends_with_the_same_average(
    settings: Settings, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for gone in ("summary.json", "final", "final_ema"):
        path = tmp_path / "run" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [path.name for path in state.complete(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    resumed = ended(at(settings, tmp_path / "run"))
    assert_same_run(resumed, finished)
    for name, tensor in average(resumed).items():
        assert torch.equal(tensor, average(finished)[name])


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_keep_the_average_of_one(
    settings: Settings, finished: Path, tmp_path: Path, sharding: str
) -> None:
    """And take up the checkpoint of one process."""
    shared = dataclasses.replace(settings, sharding=dataclasses.replace(settings.sharding, name=sharding))
    ended(at(shared, tmp_path / "two"), processes=2)
    for ours, theirs in zip(rows(tmp_path / "two", "eval"), rows(finished, "eval"), strict=True):
        assert ours["ema_val_loss"] == pytest.approx(theirs["ema_val_loss"], rel=2e-5)
    for name, tensor in average(tmp_path / "two").items():
        torch.testing.assert_close(tensor, average(finished)[name], rtol=1e-4, atol=1e-5)
    for gone in ("summary.json", "final", "final_ema"):
        path = tmp_path / "two" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ended(at(settings, tmp_path / "two"))
    for name, tensor in average(tmp_path / "two").items():
        torch.testing.assert_close(tensor, average(finished)[name], rtol=1e-4, atol=1e-5)


SMALL = "{hidden_size:16,intermediate_size:32,num_attention_heads:2,num_key_value_heads:2}"


def growing(overrides: list[str], sharding: str) -> Settings:
    """The toy run whose second half is twice as wide."""
    target = next(override for override in overrides if override.startswith("target="))
    for size in ("hidden_size:16", "intermediate_size:32", "heads:2"):
        name, _, value = size.partition(":")
        target = target.replace(size, f"{name}:{2 * int(value)}")
    second = "{until:1.0,operator:lossless,noise:0.0}"
    stages = f"+growth.stages=[{{until:0.5,sizes:{SMALL}}},{second}]"
    return compose([*without_target(overrides), target, stages, f"train.ema={DECAY}", f"sharding={sharding}"])


def kept_average(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights in the checkpoint of one process."""
    [file] = checkpoint.glob("*.safetensors")
    return {
        name.removeprefix("ema/"): tensor
        for name, tensor in load_file(file).items()
        if name.startswith("ema/")
    }


@pytest.mark.slow
def test_the_average_grows_as_the_weights_do(overrides: list[str], tmp_path: Path) -> None:
    """To the bit what `grow` makes of the first stage's average, in a folder of its own."""
    run = at(growing(overrides, "none"), tmp_path / "run", save_every_tokens=None, keep=9)
    folder = ended(run)
    own = folder / "stages" / "1-ema"
    record = json.loads((own / "growth.json").read_text())
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(record["source"]["config"]))
    held = kept_average(folder / "checkpoints" / "step-00000003")
    save_file(held, source / "model.safetensors", {"format": "pt"})
    target = json.loads((own / "config.json").read_text())
    grow(source, tmp_path / "again", target=target, operator="lossless", noise=0.0)
    ours, theirs = (load_file(at / "model.safetensors") for at in (own, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
def test_two_sharded_processes_grow_the_average_of_one(overrides: list[str], tmp_path: Path) -> None:
    ended(at(growing(overrides, "none"), tmp_path / "one"))
    ended(at(growing(overrides, "full"), tmp_path / "two"), processes=2)
    for kind in ("growth", "eval"):
        for ours, theirs in zip(rows(tmp_path / "two", kind), rows(tmp_path / "one", kind), strict=True):
            assert ours["ema_val_loss"] == pytest.approx(theirs["ema_val_loss"], rel=2e-5)
            assert (ours["ema_val_loss"] != ours["val_loss"]) == (ours["step"] > 0)
