"""Muon's momentum, grown with the weights, against what the grown model's own gradients give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import config_of, renamed
from helpers.models import random_model
from helpers.unwritten import config_of as stranger
from outgrow.growth import grow, grow_optimizer, load_optimizer
from outgrow.growth.memory import follow, plan_of
from outgrow.growth.moments import Rule, inexact
from outgrow.growth.optimizer import named_state
from outgrow.growth.origin import Origin, origins
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model, stored_names
from outgrow.train.optimizer import build_optimizer
from outgrow.train.settings import OptimizerSettings

FLOAT64 = 1e-12  # of the largest entry
WIDER = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 8, "num_hidden_layers": 3}


def muon(model: Any, rate: float = 0.0) -> torch.optim.Optimizer:
    """Muon for the hidden matrices of a model and AdamW for the rest; at a rate of 0 it moves nothing."""
    settings = OptimizerSettings("muon", rate, (0.9, 0.95), 1e-8, weight_decay=0.1, momentum=0.95)
    return build_optimizer(model, settings)


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0)


def trained(model: Any, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer after three batches."""
    numbers = torch.Generator().manual_seed(7)
    for _ in range(3):
        tokens = torch.randint(60, (2, 12), generator=numbers)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def state_of(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What is kept for each parameter, by its name."""
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def grown_state(source: Any, made: Plan, rule: Rule = "own") -> tuple[Any, dict[str, Any]]:
    """The model that a plan makes, and the state grown from that of the source after three batches."""
    grown = follow(made, source)
    optimizer = muon(grown)
    grow_optimizer(trained(source, muon(source)), source, optimizer, grown, made, rule)
    return grown, state_of(optimizer, grown)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "floor"), [("phi", FLOAT64), ("gpt2", FLOAT64), ("llama", 1e-4)])
def test_momentum_is_that_of_the_grown_models_own_gradients(name: str, floor: float) -> None:
    """Llama's norms compute in float32."""
    source = random_model(config_of(name))
    made = plan_of(source, renamed(name, WIDER), noise=0.0)
    assert list(inexact(made)) == []
    grown, mine = grown_state(source, made)
    theirs = state_of(trained(grown, muon(grown)), grown)
    steps = {step.name: step for step in made.steps}
    names = stored_names(grown)
    kinds = set()
    for parameter in mine:
        assert mine[parameter].keys() == theirs[parameter].keys()
        origin = torch.from_numpy(origins(made, steps[names[parameter]]))
        for key, moment in mine[parameter].items():
            kinds.add(key)
            if key == "step":
                assert moment == 3
                continue
            assert not moment[origin == Origin.NEW].any()
            inherited = origin >= Origin.COPY
            if inherited.any():
                expected = theirs[parameter][key]
                apart = (moment - expected)[inherited].abs().max()
                assert apart <= floor * (expected.abs().max() or 1.0), (parameter, key)
    assert kinds == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}


@pytest.mark.parametrize(
    ("depth", "rule", "expected"),
    [
        ("stack", "copied", [0, 1, 0, 1, 0]),
        ("stack", "kept", [0, 1, None, None, None]),
        ("stack", "own", [0, 1, 0, 1, 0]),
        ("stack", "reset", [None] * 5),
        ("interleave", "copied", [0, 0, 0, 1, 1]),
        ("interleave", "kept", [0, None, None, 1, None]),
        ("identity", "copied", [0, 0, 0, 1, 1]),
        ("identity", "kept", [0, None, None, 1, None]),
        ("identity", "own", [0, None, None, 1, None]),
        ([1, 0, 1], "kept", [1, 0, None]),
    ],
)
def test_each_layer_takes_the_state_of_its_source_layer_or_begins_at_zero(
    phi_config: dict[str, Any], depth: Any, rule: Rule, expected: list[int | None]
) -> None:
    """Of a layer's copies the first in the layer map is the source's own."""
    source = random_model(phi_config | {"num_hidden_layers": 2})
    old = state_of(trained(source, muon(source)), source)
    made = plan_of(source, {"num_hidden_layers": len(expected)}, depth=depth)
    _, new = grown_state(source, made, rule)
    assert {name.split(".")[2] for name in new if ".layers." in name} == set(map(str, range(len(expected))))
    for name, entry in new.items():
        start: str | None = name
        if ".layers." in name:
            number = int(name.split(".")[2])
            layer = expected[number]
            start = None if layer is None else name.replace(f".{number}.", f".{layer}.", 1)
        elif rule == "reset":
            start = None
        for key, moment in entry.items():
            if key == "step":
                assert moment == 3
            elif start is None:
                assert not moment.any(), (name, key)
            else:
                assert torch.equal(moment, old[start][key]), (name, key)


def test_a_layer_between_two_takes_the_mean_of_theirs(phi_config: dict[str, Any]) -> None:
    source = random_model(phi_config | {"num_hidden_layers": 2})
    old = state_of(trained(source, muon(source)), source)
    made = plan_of(source, {"num_hidden_layers": 3}, depth="neighbours")
    name = "model.layers.{}.mlp.fc1.weight"
    below, above = (old[name.format(number)]["momentum_buffer"] for number in (0, 1))
    for rule, expected in (("copied", (below + above) / 2), ("kept", torch.zeros_like(below))):
        _, new = grown_state(source, made, rule)  # type: ignore[arg-type]
        torch.testing.assert_close(new[name.format(1)]["momentum_buffer"], expected)
        assert torch.equal(new[name.format(2)]["momentum_buffer"], above)


@pytest.mark.parametrize("rule", ["copied", "kept"])
def test_kept_entries_are_the_sources_and_copied_ones_share_its_gradient(
    phi_config: dict[str, Any], rule: Rule
) -> None:
    """Of 40 units, 10 are copied once: each of the two sees the whole gradient of what it reads, and half
    where both are read."""
    source = random_model(phi_config | {"num_hidden_layers": 2})
    old = state_of(trained(source, muon(source)), source)
    made = plan_of(source, {"intermediate_size": 50}, noise=0.0)
    _, new = grown_state(source, made, rule)
    for layer, factor in (("fc1", "rows"), ("fc2", "columns")):
        name = f"model.layers.0.mlp.{layer}.weight"
        before, after = (state[name]["momentum_buffer"] for state in (old, new))
        if factor == "columns":
            before, after = before.T, after.T
        step = next(step for step in made.steps if step.name == name)
        axis = step.maps[0 if factor == "rows" else 1]
        times = torch.from_numpy(axis.counts()[axis.index] * axis.gain)[:, None]
        if rule == "kept":
            assert torch.equal(after[:40], before)
            assert not after[40:].any()
        else:
            torch.testing.assert_close(after, before[axis.index] / times)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_stacks_of_experts_grow_their_momentum(tmp_path: Path, name: str) -> None:
    """In memory, and on disk where each expert may lie by itself; the library's routers compute in
    float32."""
    source = random_model(stranger(name))
    source.config._experts_implementation = "eager"  # the fused kernels know no float64
    target = {"hidden_size": 32, "intermediate_size": 24}
    if name == "mixtral":
        target |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = plan_of(source, target, noise=0.0)
    grown = follow(made, source)
    grown.config._experts_implementation = "eager"
    before, after = trained(source, muon(source)), muon(grown)
    grow_optimizer(before, source, after, grown, made)
    mine, theirs = state_of(after, grown), state_of(trained(grown, muon(grown)), grown)
    stacks = 0
    for parameter, entry in theirs.items():
        for key, expected in entry.items():
            if key != "step":
                apart = (mine[parameter][key] - expected).abs().max()
                assert apart <= 1e-4 * expected.abs().max(), (parameter, key)
        stacks += "momentum_buffer" in entry and entry["momentum_buffer"].ndim == 3
    assert stacks
    source.save_pretrained(tmp_path / "source")
    torch.save(named_state(before, source), tmp_path / "optimizer.pt")
    state = {"optimizer": tmp_path / "optimizer.pt", "receipt": False}
    grow(tmp_path / "source", tmp_path / "out", target=target, noise=0.0, **state)  # type: ignore[arg-type]
    loaded = load_model(tmp_path / "out", dtype="float64", attention="eager")
    from_disk = muon(loaded)
    load_optimizer(tmp_path / "out", from_disk, loaded)
    for parameter, entry in state_of(from_disk, loaded).items():
        assert all(torch.equal(moment, mine[parameter][key]) for key, moment in entry.items()), parameter


@pytest.mark.slow
def test_routers_and_experts_that_are_new_begin_at_zero() -> None:
    """An MLP's matrices have momentum alone; a router is of no source tensor, and is Muon's too."""
    source = random_model(config_of("llama"))
    target = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    made = plan_of(source, target, "upcycle", noise=0.0)
    grown, mine = grown_state(source, made)
    grown.set_experts_implementation("eager")  # the fused kernels know no float64
    theirs = state_of(trained(grown, muon(grown)), grown)
    for name, entry in mine.items():
        assert entry.keys() == theirs[name].keys()
        is_new = ".experts." in name or ".gate." in name
        moments = [moment for key, moment in entry.items() if key != "step"]
        assert all(bool(moment.any()) != is_new for moment in moments), name


@pytest.mark.slow
def test_a_family_without_a_schema_keeps_its_first_layers() -> None:
    source = random_model(stranger("starcoder2"))
    made = plan_of(source, {"num_hidden_layers": 6}, depth="stack")
    old = state_of(trained(source, muon(source)), source)
    _, new = grown_state(source, made, "kept")
    for name, entry in new.items():
        is_copy = any(f".layers.{number}." in name for number in (3, 4, 5))
        for key in entry.keys() - {"step"}:
            assert not entry[key].any() if is_copy else torch.equal(entry[key], old[name][key]), name


@pytest.mark.parametrize(("made_by", "goes_on"), [(adam, muon), (muon, adam)])
def test_the_state_of_another_optimizer_is_refused(
    phi_config: dict[str, Any], made_by: Any, goes_on: Any
) -> None:
    source = random_model(phi_config | {"num_hidden_layers": 2})
    made = plan_of(source, {"num_hidden_layers": 3})
    grown = follow(made, source)
    before = trained(source, made_by(source))
    with pytest.raises(UserError, match="go on with the one that made it, or without it"):
        grow_optimizer(before, source, goes_on(grown), grown, made)
    with pytest.raises(UserError, match=r"optimizer: has \d+ parameters that the model has not"):
        grow_optimizer(before, grown, made_by(grown), grown, made)
    with pytest.raises(UserError, match="moments: expected one of own, transpose, copied, kept, reset"):
        grow_optimizer(before, source, made_by(grown), grown, made, "copy")  # type: ignore[arg-type]
