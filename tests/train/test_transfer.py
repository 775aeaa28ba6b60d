"""What training makes of a grown start: frozen and slower entries, Adam's state, μP's rates, a teacher, and
growth on the way."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import random_model
from helpers.toy import assert_close_run, assert_same_run, ended, rows, weights, without_target
from outgrow.growth import plan
from outgrow.growth.optimizer import read_optimizer
from outgrow.growth.origin import Origin, origins
from outgrow.growth.record import recorded_plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model
from outgrow.model.config import read_config, read_json
from outgrow.model.geometry import flops_per_token
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.loss import NextTokenLoss
from outgrow.train.optimizer import build_optimizer, set_learning_rate
from outgrow.train.run.record import Span, flops_after
from outgrow.train.schedule import new_entries
from outgrow.train.settings import (
    OptimizerSettings,
    Settings,
    TeacherSettings,
    identity,
    settings_hash,
)
from outgrow.train.start.stages import stages_of
from outgrow.train.start.teacher import TaughtLoss, scheduled
from outgrow.train.start.transfer import EntryRates, width_factors
from outgrow.train.step import Step

WIDER = "target={hidden_size:24,intermediate_size:48,num_hidden_layers:2}"
DEEPER = "target={num_hidden_layers:2}"
WARMING = ["schedule.warmup_fraction=1", "schedule.decay_fraction=0"]


@pytest.fixture(scope="module")
def source(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final folder of a run that kept its optimizer. Read only."""
    settings = compose(
        [*overrides, "train.keep_optimizer=true", f"out={tmp_path_factory.mktemp('runs') / 'source'}"]
    )
    return loop.train(settings) / "final"


def grown(overrides: list[str], source: Path, out: Path, *more: str) -> Settings:
    named = any(text.startswith("target=") for text in more)
    own = [text for text in overrides if not (named and text.startswith("target="))]
    return compose([*own, f"source={source}", "growth=lossless", f"out={out}", *more])


def trained(settings: Settings) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights that a run started from, and those that it ended with."""
    folder = loop.train(settings)
    return load_file(folder / "start" / "model.safetensors"), weights(folder)


# ---- entries -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("growth", "target"), [("llama_pro", DEEPER), ("lossless", WIDER), ("random_pad", WIDER)]
)
def test_frozen_entries_keep_their_bits_and_new_ones_learn(
    overrides: list[str], source: Path, tmp_path: Path, growth: str, target: str
) -> None:
    start, end = trained(
        grown(overrides, source, tmp_path / "run", f"growth={growth}", "transfer=frozen", target)
    )
    made = recorded_plan(tmp_path / "run" / "start")
    learnt = 0
    for step in made.steps:
        new = torch.from_numpy(origins(made, step) == Origin.NEW)
        assert torch.equal(start[step.name][~new], end[step.name][~new]), step.name
        learnt += int((start[step.name] != end[step.name]).sum())
    assert learnt > 200
    if growth == "llama_pro":  # whole tensors learn nothing, so they have no state either
        held = {
            key.split("/", 2)[2]
            for file in (tmp_path / "run" / "checkpoints").rglob("*.safetensors")
            for key in load_file(file)
            if "exp_avg/" in key
        }
        assert held
        assert all(name.startswith("model.layers.1.") for name in held)


@pytest.mark.slow
@pytest.mark.parametrize(("growth", "target"), [("llama_pro", DEEPER), ("lossless", WIDER)])
def test_no_gradient_is_paid_for_what_is_frozen(
    overrides: list[str], source: Path, tmp_path: Path, growth: str, target: str
) -> None:
    """Of a new layer on top of one that is frozen, under a frozen head: all forward, the new layer backward,
    and through the head."""
    settings = grown(overrides, source, tmp_path / "run", f"growth={growth}", "transfer=frozen", target)
    folder = loop.train(settings)
    config = read_json(folder / "final" / "config.json")
    whole, shorter = (flops_per_token(config | {"num_hidden_layers": layers}, 16) for layers in (2, 1))
    head = 2 * config["vocab_size"] * config["hidden_size"]
    # where each matrix has new entries
    expected = whole / 3 + 2 * (whole - shorter) / 3 + head if growth == "llama_pro" else whole
    assert [row["flops"] for row in rows(folder, "eval")] == pytest.approx(
        [expected * tokens for tokens in (0, 256, 512, 768)]
    )


def test_a_share_of_the_rate_is_that_share_of_the_step(overrides: list[str]) -> None:
    settings = grown(
        overrides, Path("x"), Path("run"), WIDER, "transfer.inherited_rate=0.25", "schedule.rewarm=new"
    )
    network = torch.nn.Linear(6, 4)
    plain = copy.deepcopy(network)
    mask = torch.arange(24).reshape(4, 6) % 3 > 0
    rates = EntryRates(
        network, {"weight": mask, "bias": torch.ones(4, dtype=torch.bool)}, settings, begun=0.5
    )
    before = network.weight.detach().clone()
    for model in (network, plain):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(3, 6)).square().sum().backward()
        if model is network:
            with rates.applied(
                0.5 + 0.2 * 0.3
            ):  # three tenths of the warm-up, which takes a fifth of the budget
                optimizer.step()
        else:
            optimizer.step()
    share = torch.where(mask, 0.25, 0.3)
    torch.testing.assert_close(network.weight - before, share * (plain.weight - before))
    assert (new_entries(settings.schedule, 0.2), new_entries(settings.schedule, 0.7)) == (1.0, 1.0)


@pytest.mark.slow
def test_new_entries_alone_warm_up(overrides: list[str], source: Path, tmp_path: Path) -> None:
    settings = grown(
        overrides, source, tmp_path / "run", WIDER, "schedule.rewarm=new", "train.budget_tokens=128", *WARMING
    )
    start, end = trained(settings)  # one step at half of the warm-up
    plain = dataclasses.replace(
        settings, out=str(tmp_path / "plain"), schedule=dataclasses.replace(settings.schedule, rewarm="none")
    )
    _, expected = trained(plain)
    made = recorded_plan(tmp_path / "run" / "start")
    for step in made.steps:
        new = torch.from_numpy(origins(made, step) == Origin.NEW)
        assert torch.equal(end[step.name][~new], expected[step.name][~new])
        torch.testing.assert_close(
            (end[step.name] - start[step.name])[new],
            0.5 * (expected[step.name] - start[step.name])[new],
            atol=1e-7,
            rtol=1e-3,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "moment"), [("adamw", "exp_avg"), ("muon", "momentum_buffer")])
def test_a_run_that_goes_on_from_a_frozen_one_takes_over_the_state_of_what_was_trained(
    overrides: list[str], source: Path, tmp_path: Path, optimizer: str, moment: str
) -> None:
    frozen = loop.train(
        grown(
            overrides,
            source,
            tmp_path / "frozen",
            "growth=llama_pro",
            "transfer=frozen",
            DEEPER,
            "train.keep_optimizer=true",
            f"optimizer={optimizer}",
        )
    )
    state = read_optimizer(frozen / "final", plan(read_config(frozen / "final"), {}))
    assert state.step == 6
    for name in ("model.layers.0.mlp.fc1.weight", "model.layers.1.mlp.fc1.weight"):
        is_trained = bool(torch.as_tensor(state.moments.tensors[f"{moment}.{name}"]).any())
        assert is_trained is ("layers.1." in name)
    own = ["growth=source", "transfer=continued", f"optimizer={optimizer}"]
    on = loop.train(grown(overrides, frozen / "final", tmp_path / "on", *own))
    assert (on / "summary.json").is_file()


@pytest.mark.slow
def test_freezing_all_there_is_is_refused(overrides: list[str], source: Path, tmp_path: Path) -> None:
    same = grown(overrides, source, tmp_path / "run", "transfer=frozen", "target={num_hidden_layers:1}")
    with pytest.raises(UserError, match="freezes everything"):
        loop.train(same)


# ---- matrices ----------------------------------------------------------------------------------------------


def test_matrices_learn_at_the_ratio_of_their_fan_in(phi_config: dict[str, Any]) -> None:
    target = phi_config | {"hidden_size": 72, "intermediate_size": 80}
    network = build_model(target, seed=0)
    factors = width_factors(network, phi_config, target)
    layer = "model.layers.0."
    assert (
        factors[f"{layer}self_attn.q_proj.weight"]
        == factors[f"{layer}mlp.fc1.weight"]
        == factors["lm_head.weight"]
        == 24 / 72
    )
    assert factors[f"{layer}mlp.fc2.weight"] == 40 / 80
    assert {
        factors[name] for name in factors if name.endswith("bias") or "norm" in name or "embed" in name
    } == {1.0}
    settings = OptimizerSettings(
        name="adamw", learning_rate=0.1, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.5
    )
    optimizer = build_optimizer(network, settings, factors)
    set_learning_rate(optimizer, 0.6)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert rate[id(parameter)] == pytest.approx(0.6 * factors[name]), name
        assert (decay[id(parameter)] == 0.5) == (parameter.ndim == 2 and "embed" not in name), name


# ---- the optimizer's state ---------------------------------------------------------------------------------


def first_optimizer(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> dict[str, Any]:
    """Adam's state by parameter when a run begins."""
    found: dict[str, Any] = {}

    real = loop.fill_state

    def stop(context: Any, objects: Any, *rest: Any) -> None:
        real(context, objects, *rest)
        names = {id(p): name for name, p in objects.network.named_parameters()}
        for parameter, slots in objects.optimizer.optimizer.state.items():
            found[names[id(parameter)]] = {key: value.clone() for key, value in slots.items()}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fill_state", stop)
        with pytest.raises(KeyboardInterrupt):
            loop.train(settings)
    return found


@pytest.mark.slow
def test_adams_state_is_taken_over(
    overrides: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = read_optimizer(source, plan(read_json(source / "config.json"), {}))
    control = grown(overrides, source, tmp_path / "control", "growth=source", "transfer=continued")
    for name, slots in first_optimizer(monkeypatch, control).items():
        assert slots["step"] == state.step == 6
        assert torch.equal(slots["exp_avg_sq"], state.moments.tensors[f"exp_avg_sq.{name}"])
    larger = first_optimizer(
        monkeypatch,
        grown(overrides, source, tmp_path / "grown", DEEPER, "transfer=continued", "growth.noise=0"),
    )
    origin = [0 if not idle else None for idle in recorded_plan(tmp_path / "grown" / "start").layers.identity]
    for name, slots in larger.items():
        number = int(name.split(".")[2]) if ".layers." in name else 0
        before = state.moments.tensors[f"exp_avg.{name.replace(f'.layers.{number}.', '.layers.0.')}"]
        assert torch.equal(
            slots["exp_avg"], before if origin[number] is not None else torch.zeros_like(before)
        ), name
    assert larger


@pytest.fixture(scope="module")
def muons(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a run with Muon. Read only."""
    out = tmp_path_factory.mktemp("runs") / "muons"
    settings = compose([*overrides, "train.keep_optimizer=true", "optimizer=muon", f"out={out}"])
    return loop.train(settings) / "final"


@pytest.mark.slow
def test_muons_state_is_taken_over(
    overrides: list[str], muons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that trains the source on, and by one whose new layer begins at zero."""
    state = read_optimizer(muons, plan(read_json(muons / "config.json"), {})).moments.tensors
    kinds = {name.partition(".")[0] for name in state}
    assert kinds == {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    how = ("transfer=continued", "optimizer=muon", "growth.noise=0")
    same = grown(overrides, muons, tmp_path / "same", *how[:2], "growth=source")
    deeper = grown(overrides, muons, tmp_path / "deeper", *how, DEEPER)
    control, larger = (first_optimizer(monkeypatch, settings) for settings in (same, deeper))
    for name, slots in larger.items():
        is_new = ".layers.1." in name
        origin = name.replace(".layers.1.", ".layers.0.")
        assert slots.keys() == control[origin].keys()
        for key in slots.keys() - {"step"}:
            before = torch.as_tensor(state[f"{key}.{origin}"])
            assert torch.equal(control[origin][key], before)
            assert torch.equal(slots[key], torch.zeros_like(before) if is_new else before), name
    assert {key for slots in larger.values() for key in slots} == {*kinds, "step"}


@pytest.mark.slow
@pytest.mark.parametrize("growth", ["lossless", "source"])
def test_another_optimizers_state_is_refused_before_anything_is_grown(
    overrides: list[str], source: Path, muons: Path, tmp_path: Path, growth: str
) -> None:
    target = ["target={num_hidden_layers:2}"] if growth == "lossless" else []
    for saved, name in ((source, "muon"), (muons, "adamw")):
        own = [f"growth={growth}", "transfer=continued", f"optimizer={name}", *target]
        settings = grown(overrides, saved, tmp_path / name, *own)
        with pytest.raises(UserError, match=r"transfer\.optimizer \S+: .*go on with the one that made it"):
            loop.train(settings)
        assert not (tmp_path / name / "start").exists()
        assert not (tmp_path / name / "run.json").exists()


# ---- the teacher -------------------------------------------------------------------------------------------


def test_teaching_is_the_divergence_of_the_tempered_distributions(
    phi_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outgrow.train.start.teacher.CHUNK_TOKENS", 7)  # so that chunks end unevenly
    student, teacher = (
        random_model(phi_config).float(),
        random_model(phi_config | {"num_hidden_layers": 2, "vocab_size": 90}).float(),
    )
    windows = torch.randint(90, (3, 12), generator=torch.Generator().manual_seed(0))
    objective = TaughtLoss(NextTokenLoss(student, fused=True), teacher)
    assert not any("teacher" in name for name in objective.state_dict())
    assert len(list(objective.parameters())) == len(list(student.parameters()))
    given, text = objective(windows, reduction="sum", weight=0.3, temperature=2.0)
    given.backward()
    mine = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    student.zero_grad()
    logits, taught = (model(input_ids=windows[:, :-1]).logits.flatten(0, 1) for model in (student, teacher))
    expected_text = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="sum")
    p, q = (taught / 2).softmax(-1).detach(), (logits[:, :90] / 2).softmax(-1)
    expected = 0.7 * expected_text + 0.3 * 4 * (p * (p.log() - q.log())).sum()
    torch.testing.assert_close((given, text), (expected, expected_text), rtol=1e-5, atol=1e-5)
    expected.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(objective(windows), NextTokenLoss(student, fused=True)(windows))


def test_weight_and_temperature_go_on_straight_lines() -> None:
    settings = TeacherSettings(model="source", weight=(0.8, 0.2), temperature=(3.0, 1.0), until=0.5)
    assert [scheduled(settings, progress) for progress in (0.0, 0.25, 0.5, 0.9)] == [
        (0.8, 3.0), (pytest.approx(0.5), pytest.approx(2.0)), (0.0, 1.0), (0.0, 1.0),
    ]  # fmt: skip


def test_a_taught_run_pays_for_its_teacher_and_ends_closer_to_it(
    overrides: list[str], source: Path, tmp_path: Path
) -> None:
    how = [
        "growth=scratch",
        f"source={source}",
        "transfer=distilled",
        "transfer.teacher.weight=[1.0,1.0]",
        "target={num_hidden_layers:1}",
    ]
    bare = without_target(overrides)
    folder = loop.train(compose([*bare, *how, f"out={tmp_path / 'taught'}"]))
    config, taught = read_json(source / "config.json"), rows(folder, "eval")
    own = flops_per_token(config, 16)
    assert [row["flops"] for row in taught] == pytest.approx(
        [0, 256 * own * 4 / 3, 384 * own * 4 / 3 + 128 * own, 384 * own * 4 / 3 + 384 * own]
    )
    plain = loop.train(
        compose(
            [
                *without_target(overrides),
                f"source={source}",
                "growth=scratch",
                "target={num_hidden_layers:1}",
                f"out={tmp_path / 'plain'}",
            ]
        )
    )
    assert rows(plain, "eval")[0]["val_loss"] == taught[0]["val_loss"]
    assert rows(plain, "eval")[1]["val_loss"] != taught[1]["val_loss"]
    sources = [json.loads((run / "run.json").read_text())["start"]["source"] for run in (folder, plain)]
    assert sources[0]["flops"] == json.loads((source / "ledger.json").read_text())["flops"] > 0, (
        "its training is what teaching needs"
    )
    assert sources[1] is None
    card = (folder / "final" / "README.md").read_text()
    assert "| started from | scratch |" in card
    assert f"| taught by | `{source}`, for 50% of the budget |" in card


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["growth=scratch", "transfer=distilled", "target={num_hidden_layers:1}"], ["growth=source"]]
)
def test_weights_replaced_between_two_starts_are_refused(
    overrides: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    """Of a teacher, and of a source that is trained on: the same bytes elsewhere are the same, other bytes in
    the same place are not."""
    shutil.copytree(source, tmp_path / "theirs")
    own = without_target(overrides) if any(text.startswith("target=") for text in how) else overrides
    settings = compose([*own, *how, f"source={tmp_path / 'theirs'}", f"out={tmp_path / 'run'}"])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Meter, "count", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
        for _ in range(2):  # untouched, it begins again
            with pytest.raises(ZeroDivisionError):
                loop.train(settings)
    file = tmp_path / "theirs" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(
        UserError, match=r"the weights of the (teacher|source) have changed since this run began"
    ):
        loop.train(settings)


@pytest.mark.slow
def test_a_start_that_is_damaged_before_its_first_checkpoint_is_refused(
    overrides: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of the grown start; a checkpoint's weights stand in for its own."""
    own = [*without_target(overrides), "growth=lossless", "target={num_hidden_layers:2}"]
    settings = compose([*own, f"source={source}", f"out={tmp_path / 'run'}"])

    def stop_before(stop: int) -> None:
        step = Step.__call__

        def limited(self: Step, i: int) -> Any:
            if i == stop:
                raise ZeroDivisionError
            return step(self, i)

        with monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", limited)
            with pytest.raises(ZeroDivisionError):
                loop.train(settings)

    for _ in range(2):  # untouched, it begins again
        stop_before(0)
    file = tmp_path / "run" / "start" / "model.safetensors"
    whole = file.read_bytes()
    damaged = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="the weights of the start have changed since this run began"):
        loop.train(settings)
    file.write_bytes(whole)
    stop_before(3)
    file.write_bytes(damaged)
    assert (loop.train(settings) / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        (["growth=source"], "start"),
        (["growth=scratch", "transfer=distilled", "target={num_hidden_layers:1}"], "transfer.teacher"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_told_before_a_step_not_as_a_rate_that_is_too_high(
    overrides: list[str], source: Path, tmp_path: Path, how: list[str], told: str, value: float
) -> None:
    theirs = shutil.copytree(source, tmp_path / "theirs")
    stored = load_file(theirs / "model.safetensors")
    stored["lm_head.bias"][3] = value
    save_file(stored, theirs / "model.safetensors", metadata={"format": "pt"})
    own = without_target(overrides) if told != "start" else overrides
    settings = compose([*own, *how, f"source={theirs}", f"out={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=rf"^{told} \S+/theirs: lm_head\.bias: NaN or infinite.*; repair"):
        loop.train(settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not rows(tmp_path / "run")


@pytest.mark.slow
def test_moments_that_are_damaged_before_the_first_checkpoint_are_refused(
    overrides: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = grown(overrides, source, tmp_path / "run", DEEPER, "transfer=continued")
    first_optimizer(monkeypatch, settings)
    first_optimizer(monkeypatch, settings)  # untouched, it begins again
    file = tmp_path / "run" / "start" / "optimizer" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="the weights of the start's optimizer have changed since this run"):
        loop.train(settings)


@pytest.mark.slow
def test_a_sources_ledger_that_is_no_json_is_told(overrides: list[str], source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "theirs")
    for text in ("{", "[]", ""):
        (tmp_path / "theirs" / "ledger.json").write_text(text)
        with pytest.raises(UserError, match=r"ledger\.json"):
            loop.train(grown(overrides, tmp_path / "theirs", tmp_path / "run"))


def test_a_teacher_of_more_tokens_is_refused(overrides: list[str], source: Path, tmp_path: Path) -> None:
    bare = without_target(overrides)
    settings = compose(
        [
            *bare,
            f"source={source}",
            "growth=scratch",
            "transfer=distilled",
            "target={vocab_size:290}",
            f"out={tmp_path / 'run'}",
        ]
    )
    with pytest.raises(UserError, match="has 300 tokens, the model 290"):
        loop.train(settings)


# ---- growth on the way -------------------------------------------------------------------------------------

FIRST, SECOND = "{until:0.34,layers:0.25}", "{until:0.67,layers:0.5,depth:stack,noise:0.0}"
STAGES = f"growth.stages=[{FIRST},{SECOND},{{until:1.0,depth:identity,noise:0.0,moments:true}}]"


@pytest.fixture(scope="module")
def staged(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Six steps: two of one layer, two of two, two of four."""
    own = [text.replace("num_hidden_layers:1", "num_hidden_layers:4") for text in overrides]
    return compose([*own, "growth=g_stack", STAGES, f"out={tmp_path_factory.mktemp('runs') / 'staged'}"])


@pytest.mark.slow
def test_a_run_grows_on_its_way_in_one_folder_on_one_clock(staged: Settings) -> None:
    folder = loop.train(staged)
    assert read_json(folder / "final" / "config.json")["num_hidden_layers"] == 4
    run, summary = (
        json.loads((folder / "run.json").read_text()),
        json.loads((folder / "summary.json").read_text()),
    )
    costs = [
        flops_per_token(run["target_config"] | {"num_hidden_layers": layers}, 16) for layers in (1, 2, 4)
    ]
    assert costs[0] < costs[1] < costs[2] == run["flops_per_token"]
    assert summary["flops"] == pytest.approx(256 * sum(costs))
    assert [row["flops"] for row in rows(folder, "eval")] == pytest.approx(
        [0, 256 * costs[0], 256 * sum(costs[:2]), 256 * sum(costs)]
    )
    grown = rows(folder, "growth")
    assert [row["step"] for row in grown] == [2, 4]
    losses = {row["step"]: row["val_loss"] for row in rows(folder, "eval")}
    before = {row["step"]: row["val_loss"] for row in rows(folder, "before_growth")}
    assert before == {2: losses[2], 4: losses[4]}
    assert grown[1]["val_loss"] == pytest.approx(losses[4], abs=1e-5), "an identity growth keeps the loss"
    assert grown[0]["val_loss"] != pytest.approx(losses[2], abs=1e-5), "a stacked one does not"
    assert sorted(path.name for path in (folder / "stages").iterdir()) == ["1", "2"]
    growths = "at 34% of the budget: lossless; at 67% of the budget: lossless, moments grown"
    assert f"| grown on the way | {growths} |" in (folder / "final" / "README.md").read_text()


@pytest.mark.slow
def test_growing_on_the_way_resumes_exactly(
    staged: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = loop.train(staged)
    settings = dataclasses.replace(staged, out=str(tmp_path / "run"))
    calls = iter(range(100))
    real = Step.__call__

    def step(self: Any, i: int) -> tuple[float, float]:
        if next(calls) in (
            2,
            4,
            5,
        ):  # before the first step of each later stage, and in the midst of the last
            raise KeyboardInterrupt
        return real(self, i)

    monkeypatch.setattr(Step, "__call__", step)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            loop.train(settings)
    assert_same_run(loop.train(settings), undisturbed)


@pytest.mark.slow
def test_adams_state_grows_from_stage_to_stage_where_that_is_asked(
    staged: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[float] = []
    real = loop.fill_state

    def fill(context: Any, objects: Any, *rest: Any) -> None:
        real(context, objects, *rest)
        begun.append(
            max((float(slots["step"]) for slots in objects.optimizer.optimizer.state.values()), default=0.0)
        )

    monkeypatch.setattr(loop, "fill_state", fill)
    loop.train(dataclasses.replace(staged, out=str(tmp_path / "run")))
    assert begun == [0.0, 0.0, 2.0]


@pytest.fixture(scope="module", params=["reset", "copied", "kept"])
def stacked(
    request: pytest.FixtureRequest, overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    """Six steps of Muon: three of two layers, three of four."""
    own = [text.replace("num_hidden_layers:1", "num_hidden_layers:4") for text in overrides]
    second = f"{{until:1.0,depth:stack,noise:0.0,moments:{request.param}}}"
    stages = f"growth.stages=[{{until:0.5,layers:0.5}},{second}]"
    out = tmp_path_factory.mktemp("runs") / "stacked"
    return compose([*own, "growth=g_stack", stages, "optimizer=muon", f"out={out}"])


@pytest.mark.slow
def test_muons_state_grows_from_stage_to_stage_as_asked_and_resumes_exactly(
    stacked: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = stacked.growth.stages[1].rule
    states: list[dict[str, dict[str, torch.Tensor]]] = []

    def told(objects: Any) -> dict[str, dict[str, torch.Tensor]]:
        state = objects.optimizer.optimizer.state
        parameters = objects.network.named_parameters()
        return {name: copy.deepcopy(state[p]) for name, p in parameters if p in state}

    with monkeypatch.context() as patch:
        grow_into, fill_state = loop.grow_into, loop.fill_state

        def before(context: Any, objects: Any, following: Any) -> None:
            states.append(told(objects))
            grow_into(context, objects, following)

        def after(context: Any, objects: Any, *rest: Any) -> None:
            fill_state(context, objects, *rest)
            states.append(told(objects))

        patch.setattr(loop, "grow_into", before)
        patch.setattr(loop, "fill_state", after)
        undisturbed = loop.train(stacked)
    first, trained, grown = states
    assert first == {}
    assert (grown == {}) == (rule == "reset")
    for name, entry in grown.items():
        number = int(name.split(".")[2]) if ".layers." in name else None
        origin = name if number is None else name.replace(f".{number}.", f".{number % 2}.", 1)
        is_own = number is None or number < 2
        assert entry.keys() == trained[origin].keys()
        for key, moment in entry.items():
            expected = trained[origin][key]
            assert torch.equal(
                moment, expected if key == "step" or is_own or rule == "copied" else 0 * expected
            )
    kinds = {key for entry in grown.values() for key in entry}
    assert kinds in (set(), {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"})

    settings = dataclasses.replace(stacked, out=str(tmp_path / "run"))
    calls = iter(range(100))
    real = Step.__call__

    def step(self: Any, i: int) -> tuple[float, float]:
        if next(calls) in (
            2,
            3,
            5,
        ):  # before the last of the first stage, the first of the second, in its midst
            raise KeyboardInterrupt
        return real(self, i)

    monkeypatch.setattr(Step, "__call__", step)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            loop.train(settings)
    assert_same_run(loop.train(settings), undisturbed)


def test_runs_recorded_before_moments_were_a_choice_go_on(staged: Settings) -> None:
    """What their records hold is true and false; the default is what false was."""
    recorded = dataclasses.asdict(staged)
    now = settings_hash(staged)
    assert [stage["moments"] for stage in recorded["growth"]["stages"]] == ["reset", "reset", True]
    for stage in recorded["growth"]["stages"][:2]:
        stage["moments"] = False
    assert settings_hash(recorded) == now
    assert identity(staged) == identity(recorded)
    recorded["growth"]["stages"][2]["moments"] = "copied"
    assert settings_hash(recorded) != now


def test_stages_divide_the_budget_and_spans_add_up(staged: Settings, phi_config: dict[str, Any]) -> None:
    found = stages_of(staged, phi_config | {"num_hidden_layers": 4})
    assert [(stage.first, stage.last, stage.config["num_hidden_layers"], stage.growth.operator) for stage in found] == [
        (0, 2, 1, "scratch"), (2, 4, 2, "lossless"), (4, 6, 4, "lossless"),
    ]  # fmt: skip
    spans = [Span(2, 1.0), Span(5, 10.0)]
    assert [flops_after(spans, step, 100) for step in range(6)] == [0, 100, 200, 1200, 2200, 3200]


# ---- processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_processes_give_the_losses_of_one(
    overrides: list[str], source: Path, staged: Settings, tmp_path: Path
) -> None:
    ways = {
        "frozen": ["growth=lossless", "transfer=frozen", WIDER],
        "slow": [
            "growth=lossless",
            "transfer=continued",
            "transfer.inherited_rate=0.3",
            "schedule.rewarm=new",
            WIDER,
        ],
        "taught": ["growth=lossless", "transfer=distilled", WIDER],
    }
    runs = {name: grown(overrides, source, tmp_path / name, *way) for name, way in ways.items()} | {
        "staged": staged
    }
    deep = [text.replace("num_hidden_layers:1", "num_hidden_layers:4") for text in overrides]
    runs["muon"] = compose([*deep, "growth=g_stack", STAGES, "optimizer=muon", f"out={tmp_path / 'muon'}"])
    spread = [dataclasses.replace(run, out=str(tmp_path / f"{name}-2")) for name, run in runs.items()]
    ended(*spread, processes=2)
    for name, run in runs.items():
        assert_close_run(tmp_path / f"{name}-2", loop.train(run))


# ---- what cannot be ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["growth=scratch", "transfer=frozen"], "transfer.inherited_rate: growth=scratch grows nothing"),
        (["growth=scratch", "transfer.optimizer=x.bin"], "transfer.optimizer: growth=scratch has no weights"),
        (["growth=scratch", "transfer=distilled"], "transfer.teacher: needs a source"),
        (["growth=scratch", "transfer.mup=true"], "transfer.mup: needs a source"),
        (
            ["source=x", "growth=lossless", "transfer=continued", "optimizer=adamw_8bit"],
            "transfer.optimizer: for optimizer=adamw or muon; found adamw_8bit",
        ),
        (
            ["train.keep_optimizer=true", "optimizer=adamw_8bit"],
            "train.keep_optimizer: for optimizer=adamw or",
        ),
        (
            ["source=x", "growth=lossless", "transfer.mup=true", "optimizer=muon"],
            "transfer.mup: for optimizer=adamw; found muon",
        ),
        (
            ["source=x", "growth=lossless", "transfer=frozen", "sharding=full"],
            "transfer.inherited_rate: needs whole tensors",
        ),
        (
            ["source=x", "growth=lossless", "transfer.inherited_rate=-1"],
            "transfer.inherited_rate: a share of the learning rate",
        ),
        (
            ["source=x", "growth=lossless", "transfer=distilled", "transfer.teacher.weight=[2,0]"],
            "weights are between 0 and 1",
        ),
        (
            ["source=x", "growth=lossless", "transfer=distilled", "transfer.teacher.until=0"],
            "transfer.teacher.until: a share",
        ),
        (
            [
                "growth=g_stack",
                "growth.stages=[{until:0.5},{until:1.0,moments:true}]",
                "optimizer=adamw_8bit",
            ],
            "growth.stages.moments: for optimizer=adamw or muon; found adamw_8bit",
        ),
        (
            ["growth=g_stack", "growth.stages=[{until:0.5},{until:1.0,moments:mine}]", "seed=many"],
            "growth.stages[1].moments: unknown value 'mine'; known: copied, false, kept, reset, true",
        ),
        (
            ["growth=g_stack", "growth.stages=[{until:0.5},{until:1.0,moments:copy}]"],
            "did you mean 'copied'?",
        ),
        (
            ["growth=g_stack", "growth.stages=[{until:0.5},{until:0.4}]"],
            "growth.stages: each must end later than the one before",
        ),
        (
            ["growth=g_stack", "growth.stages=[{until:0.5},{until:1.0,operator:scratch}]"],
            "growth.stages[1].operator: scratch grows nothing",
        ),
    ],
)
def test_what_cannot_be_is_told(overrides: list[str], given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compose([*overrides, *given])


def test_a_stage_without_a_step_is_told(staged: Settings, phi_config: dict[str, Any]) -> None:
    short = dataclasses.replace(staged, train=dataclasses.replace(staged.train, budget_tokens=256))
    with pytest.raises(UserError, match=r"growth.stages\[1\]: from step 1 to 1 of 2 there is no step"):
        stages_of(short, phi_config | {"num_hidden_layers": 4})


def test_a_growth_on_the_way_that_cannot_be_is_told_before_the_first_step(
    overrides: list[str], tmp_path: Path
) -> None:
    stages = "growth.stages=[{until:0.5,sizes:{hidden_size:64}},{until:1.0,operator:lossless,noise:0.0}]"
    settings = compose([*overrides, "growth=g_stack", stages, f"out={tmp_path / 'run'}"])
    with pytest.raises(
        UserError, match=r"(?s)growth\.stages\[1\]: .*residual 16 is smaller than the source's 64"
    ):
        loop.train(settings)
    assert not (tmp_path / "run" / "run.json").exists()


# ---- families without a schema -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_family_without_a_schema_is_grown_and_trained(overrides: list[str], tmp_path: Path) -> None:
    sizes = (
        "hidden_size:16,intermediate_size:32,num_hidden_layers:1,num_attention_heads:2,num_key_value_heads:2"
    )
    own = f"target={{model_type:starcoder2,vocab_size:300,max_position_embeddings:32,bos_token_id:0,eos_token_id:0,{sizes}}}"
    bare = [text for text in overrides if not text.startswith("target=")]
    small = loop.train(compose([*bare, own, f"out={tmp_path / 'small'}"]))
    larger = grown(
        bare,
        small / "final",
        tmp_path / "large",
        "target={hidden_size:32,num_attention_heads:4,num_key_value_heads:4}",
    )
    end = rows(loop.train(larger), "eval")
    assert end[0]["val_loss"] == pytest.approx(rows(small, "eval")[-1]["val_loss"], abs=1e-4), (
        "the growth is lossless"
    )
    assert end[-1]["flops"] == pytest.approx(
        768 * json.loads((tmp_path / "large" / "run.json").read_text())["flops_per_token"]
    )


@pytest.mark.slow
def test_a_family_without_a_schema_grows_on_its_way(overrides: list[str], tmp_path: Path) -> None:
    sizes = (
        "hidden_size:16,intermediate_size:32,num_hidden_layers:4,num_attention_heads:2,num_key_value_heads:2"
    )
    own = f"target={{model_type:starcoder2,vocab_size:300,max_position_embeddings:32,bos_token_id:0,eos_token_id:0,{sizes}}}"
    bare = [text for text in overrides if not text.startswith("target=")]
    settings = compose([*bare, own, "growth=g_stack", STAGES, f"out={tmp_path / 'run'}"])
    folder = loop.train(settings)
    assert read_json(folder / "final" / "config.json")["num_hidden_layers"] == 4
    run = json.loads((folder / "run.json").read_text())
    costs = [
        flops_per_token(run["target_config"] | {"num_hidden_layers": layers}, 16) for layers in (1, 2, 4)
    ]
    assert [row["flops"] for row in rows(folder, "growth")] == pytest.approx(
        [256 * costs[0], 256 * sum(costs[:2])]
    )
    before, grown_losses = (
        [row["val_loss"] for row in rows(folder, kind)] for kind in ("before_growth", "growth")
    )
    assert grown_losses[1] == pytest.approx(before[1], abs=1e-5), "an identity growth keeps the loss"
    assert grown_losses[0] != pytest.approx(before[0], abs=1e-5), "a stacked one does not"
