"""Adam's moments and origins against the gradients of the grown model itself."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from helpers.families import FAMILIES, MULTI_HEAD, config_of, growths, renamed
from helpers.models import random_model
from helpers.unwritten import config_of as stranger
from outgrow.growth import grow, grow_optimizer, load_optimizer, plan
from outgrow.growth.__main__ import run, settings_from
from outgrow.growth.decision import Step
from outgrow.growth.memory import config_of as config_of_model
from outgrow.growth.memory import follow, plan_of
from outgrow.growth.moments import ADAM, RULES, inexact
from outgrow.growth.optimizer import fill
from outgrow.growth.origin import Origin, axis_origins, origins
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model, stored_names
from outgrow.model.conversion import in_file
from outgrow.model.family import families

FLOOR = {"layer": 1e-8, "rms": 1e-4}  # of the largest moment; the library's RMSNorms compute in float32
EXACT = [
    {"operator": "lossless"},
    {"operator": "lemon"},
    {"operator": "hyperclone"},
    {"operator": "hyperclone", "form": "diagonal"},
]


def adam(model: Any) -> torch.optim.AdamW:
    """Adam over a model's parameters that moves nothing, so that all its steps see the same weights."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)


def trained(
    model: Any, optimizer: torch.optim.Optimizer | None = None, *, seed: int = 7
) -> torch.optim.Optimizer:
    """The optimizer after three batches."""
    optimizer, numbers = optimizer or adam(model), torch.Generator().manual_seed(seed)
    for _ in range(3):
        tokens = torch.randint(60, (2, 12), generator=numbers)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def doubled(name: str) -> dict[str, int]:
    heads = {"num_attention_heads": 8, **({} if name in MULTI_HEAD else {"num_key_value_heads": 4})}
    return renamed(name, {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, **heads})


def furthest(source: Any, made: Plan, least: Origin = Origin.COPY) -> float:
    """How far the moments grown from the source's lie from those the grown model's own gradients give,
    relative to the tensor's largest."""
    grown = follow(made, source)
    expected, optimizer = trained(grown), adam(grown)
    grow_optimizer(trained(source), source, optimizer, grown, made)
    steps, names, worst = {step.name: step for step in made.steps}, stored_names(grown), 0.0
    for name, parameter in grown.named_parameters():
        mine, theirs = optimizer.state[parameter], expected.state[parameter]
        assert mine["step"] == theirs["step"] == 3
        inherited = torch.from_numpy(origins(made, steps[names[name]]) >= least)
        for key in ("exp_avg", "exp_avg_sq"):
            assert not mine[key][torch.from_numpy(origins(made, steps[names[name]]) == Origin.NEW)].any(), (
                "what is new starts at zero"
            )
            scale = float(theirs[key].abs().max()) or 1.0
            worst = max(
                worst,
                float((mine[key] - theirs[key])[inherited].abs().max()) / scale if inherited.any() else 0.0,
            )
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_moments_are_those_of_the_grown_models_own_gradients(name: str, tied: bool) -> None:
    source, floor = random_model(config_of(name, tie_word_embeddings=tied)), FLOOR[families()[name].norm]
    for how in EXACT:
        made = plan_of(source, doubled(name), **{"noise": 0.0} | how)
        assert list(inexact(made)) == []
        assert furthest(source, made) <= floor, how
    uneven = plan_of(source, renamed(name, growths(name)["width"]), noise=0.0)
    assert (furthest(source, uneven) <= floor) == (not list(inexact(uneven)))
    assert bool(list(inexact(uneven))) == (families()[name].norm == "layer")


@pytest.mark.slow
def test_noise_and_new_tokens_are_named_as_what_makes_moments_inexact() -> None:
    source = random_model(config_of("llama"))
    for sizes, options, reason in (
        ({"intermediate_size": 80}, {"noise": 0.3}, "noise 0.3"),
        ({"vocab_size": 64}, {}, "vocab"),
    ):
        made = plan_of(source, sizes, **options)
        assert [fault.split(":")[0] for fault in inexact(made)] == [reason]
        assert furthest(source, made) > 1e-3


def means(values: torch.Tensor, step: Step) -> torch.Tensor:
    """The mean over all copies of each source entry, in the source's shape."""
    for dim, axis in enumerate(step.maps):
        share = torch.zeros(axis.source, axis.target, dtype=values.dtype)
        taken = np.flatnonzero(axis.copies)
        share[axis.index[taken], taken] = 1.0
        values = torch.tensordot(share / share.sum(1, keepdim=True), values, ([1], [dim])).movedim(0, dim)
    return values


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_under_noise_copies_get_the_mean_of_their_own_moments(name: str, tied: bool) -> None:
    source = random_model(config_of(name, tie_word_embeddings=tied))
    # most eager attentions take the softmax in float32, and copies are rounded apart
    floor = max(FLOOR[families()[name].norm], 1e-6)
    made = plan_of(source, doubled(name), noise=0.5)
    assert [fault.split(":")[0] for fault in inexact(made)] == ["noise 0.5"]
    grown = follow(made, source)
    expected, optimizer = trained(grown), adam(grown)
    grow_optimizer(trained(source), source, optimizer, grown, made)
    steps, names, uneven = {step.name: step for step in made.steps}, stored_names(grown), 0
    for parameter_name, parameter in grown.named_parameters():
        step, mine, theirs = (
            steps[names[parameter_name]],
            optimizer.state[parameter],
            expected.state[parameter],
        )
        if step.source is None or (step.tensor.layer is not None and made.layers.identity[step.tensor.layer]):
            continue
        first, second = (
            (means(mine[key], step), means(theirs[key], step)) for key in ("exp_avg", "exp_avg_sq")
        )
        # OPT's key biases have none
        assert (first[0] - first[1]).abs().max() <= floor * max(first[1].abs().max(), 1e-3), parameter_name
        assert (second[0] - second[1]).max() <= floor * max(second[1].max(), 1e-6), parameter_name
        uneven += int((second[1] - second[0]).max() > 1e-2 * second[1].max())
    assert uneven > 10


STRANGERS: dict[
    str, dict[str, int]
] = {  # experts in one tensor of three axes, experts that the library joins as it loads, all in one
    "gpt_oss": {"hidden_size": 32, "intermediate_size": 24},
    "mixtral": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
    },
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRANGERS)
def test_moments_of_a_derived_family(tmp_path: Path, name: str) -> None:
    source = random_model(stranger(name))
    source.config._experts_implementation = "eager"  # the fused kernels know no float64
    made = plan_of(source, STRANGERS[name], noise=0.0)
    assert made.certificate.lossless
    assert list(inexact(made)) == []
    grown = follow(made, source)
    grown.config._experts_implementation = "eager"
    expected, optimizer = trained(grown), adam(grown)
    grow_optimizer(trained(source), source, optimizer, grown, made)
    steps, shapes = {step.name: step for step in made.steps}, set()
    for key in ("exp_avg", "exp_avg_sq"):
        mine, theirs = (
            in_file(
                config_of_model(grown),
                {name: state.state[parameter][key] for name, parameter in grown.named_parameters()},
            )
            for state in (optimizer, expected)
        )
        assert mine.keys() == steps.keys()
        for tensor, step in steps.items():
            inherited = torch.from_numpy(origins(made, step) >= Origin.COPY)
            if inherited.any():
                apart = (mine[tensor] - theirs[tensor])[inherited].abs().max()
                # routers and norms compute in float32
                assert apart <= FLOOR["rms"] * theirs[tensor].abs().max(), tensor
                shapes.add(len(step.shape))
    assert shapes == {"gpt_oss": {1, 2, 3}}.get(name, {1, 2})

    source.save_pretrained(tmp_path / "source")
    torch.save(trained(source).state_dict(), tmp_path / "optimizer.pt")
    grow(
        tmp_path / "source",
        tmp_path / "out",
        target=STRANGERS[name],
        noise=0.0,
        optimizer=tmp_path / "optimizer.pt",
        receipt=False,
    )
    loaded = load_model(tmp_path / "out", dtype="float64", attention="eager")
    from_disk = adam(loaded)
    load_optimizer(tmp_path / "out", from_disk, loaded)
    for there, here in zip(loaded.parameters(), grown.parameters(), strict=True):
        assert torch.equal(there, here)
        assert all(
            torch.equal(from_disk.state[there][key], optimizer.state[here][key])
            for key in ("exp_avg", "exp_avg_sq")
        )


@pytest.mark.slow
def test_operators_that_do_not_keep_the_function_reset_or_keep_originals_only() -> None:
    source = random_model(config_of("gpt2"))
    target = renamed("gpt2", {"hidden_size": 32, "intermediate_size": 60})
    for operator in ("random_pad", "tile", "zero_pad", "bert2bert_aki", "sparkling"):
        made = plan_of(source, target, operator)
        grown = follow(made, source)
        before, optimizer = trained(source), adam(grown)
        grow_optimizer(before, source, optimizer, grown, made)
        kept, old = grown.transformer.h[1].mlp.c_fc.weight, source.transformer.h[1].mlp.c_fc.weight
        moment = optimizer.state[kept]["exp_avg"]
        if operator == "sparkling":
            assert torch.equal(moment[:24, :40], before.state[old]["exp_avg"])
            moment[:24, :40] = 0
        assert not moment.any(), operator
        assert next(inexact(made)).startswith(f"operator {operator!r}")


def test_origins_of_copies_new_layers_and_repeated_layers(phi_config: dict[str, Any]) -> None:
    made = plan(phi_config, {"intermediate_size": 90, "num_hidden_layers": 5})
    steps = {step.name: step for step in made.steps}
    expected = [Origin.ORIGINAL] * 40 + [Origin.COPY] * 50
    rows, columns = axis_origins(made, steps["model.layers.0.mlp.fc1.weight"])
    assert rows.tolist() == expected
    assert columns.tolist() == [Origin.ORIGINAL] * 24
    new = [number for number, idle in enumerate(made.layers.identity) if idle]
    assert new
    for number in range(5):
        whole = origins(made, steps[f"model.layers.{number}.mlp.fc2.weight"])
        assert (whole == (Origin.NEW if number in new else np.broadcast_to(expected, (24, 90)))).all()
    stacked = plan(phi_config, {"num_hidden_layers": 5}, depth="stack")
    of_layer = {
        step.tensor.layer: int(origins(stacked, step).max())
        for step in stacked.steps
        if step.tensor.layer is not None
    }
    assert of_layer == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}
    vocabulary = next(step for step in plan(phi_config, {"vocab_size": 99}).steps if "embed" in step.name)
    assert origins(made, vocabulary)[:, 0].tolist() == [Origin.ORIGINAL] * 96 + [Origin.NEW] * 3


def saved(tmp_path: Path, model: Any, form: str) -> Path:
    """A file or folder with Adam's state of `model` after three batches, as `form` saves it."""
    named = list(model.named_parameters())
    if form == "accelerate":
        accelerator = Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        )
        trained(prepared, optimizer)
        accelerator.save_state(str(tmp_path / "state"))
        return tmp_path / "state"
    groups: Any = {
        "one group": [parameter for _, parameter in named],
        "named, shuffled": [{"params": named[3:]}, {"params": named[:3]}],
        "matrices and vectors": [
            {"params": [p for _, p in named if p.ndim > 1]},
            {"params": [p for _, p in named if p.ndim == 1]},
        ],
    }[form]
    torch.save(
        trained(model, torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)).state_dict(),
        tmp_path / "optimizer.pt",
    )
    return tmp_path / "optimizer.pt"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["one group", "named, shuffled", "matrices and vectors", "accelerate"])
@pytest.mark.parametrize("name", ["phi", "gpt_neox"])
def test_saved_states_grow_on_disk_as_in_memory(tmp_path: Path, name: str, form: str) -> None:
    source, target = random_model(config_of(name)), doubled(name)
    source.save_pretrained(tmp_path / "source")
    optimizer = saved(tmp_path, source, form)
    grown = grow(
        tmp_path / "source",
        tmp_path / "out",
        target=target,
        noise=0.0,
        optimizer=optimizer,
        max_shard_bytes=200_000,
    )
    loaded = load_model(tmp_path / "out", dtype="float64", attention="eager")
    mine, expected = adam(loaded), adam(loaded)
    load_optimizer(tmp_path / "out", mine, loaded)
    source = random_model(config_of(name))
    grow_optimizer(trained(source), source, expected, loaded, grown.plan)
    for parameter in loaded.parameters():
        assert all(
            torch.equal(mine.state[parameter][key], expected.state[parameter][key])
            for key in ("step", "exp_avg", "exp_avg_sq")
        )
    assert json.loads((tmp_path / "out/optimizer/state.json").read_text()) == {
        "step": 3,
        "rule": "grown by the transposed maps",
        "inexact": [],
    }
    trained(loaded, mine)  # and it goes on


def test_the_command_grows_a_state_by_the_rule_that_it_is_given(phi_folder: Path, tmp_path: Path) -> None:
    model = load_model(phi_folder)
    torch.save(trained(model).state_dict(), tmp_path / "optimizer.pt")
    given = [
        f"source={phi_folder}",
        "target={intermediate_size:80}",
        f"optimizer={tmp_path}",
        "receipt=false",
    ]
    for moments in ((), ("moments=kept",)):
        out = tmp_path / "".join(("grown", *moments))
        run(settings_from([*given, f"out={out}", *moments]))
        rule = json.loads((out / "optimizer/state.json").read_text())["rule"]
        assert rule == RULES["kept" if moments else "transpose"]
    grown = load_model(out)
    optimizer = adam(grown)
    load_optimizer(out, optimizer, grown)
    bias = dict(grown.named_parameters())["model.layers.0.mlp.fc1.bias"]
    assert (optimizer.state[bias]["exp_avg"][:64] != 0).any()
    assert (optimizer.state[bias]["exp_avg"][64:] == 0).all()  # copies, reset


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("moments=kpt", "moments: unknown value 'kpt'; did you mean 'kept'"),
        ("moments=kept", "moments=kept: how an optimizer's state grows, and none is given; give optimizer="),
    ],
)
def test_the_command_tells_a_rule_that_cannot_be_followed(given: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings_from(["source=phi_1_5", "target=phi_2", "out=x", given])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("param_groups"), "expected the keys 'state' and 'param_groups'"),
        (lambda state: state["state"].clear(), "empty; was it saved before the first step?"),
        (
            lambda state: state["state"][0].pop("exp_avg_sq"),
            "parameter 0 (model.embed_tokens.weight) has no 'exp_avg_sq'",
        ),
        (
            lambda state: state["state"][0].update(exp_avg=torch.zeros(2)),
            "exp_avg of parameter 0 has shape (2,)",
        ),
        (lambda state: state["param_groups"][0]["params"].pop(), "is it the state of another model?"),
        (
            lambda state: state["state"].update({0: 3}),
            "has no 'exp_avg', found int; only Adam's and Muon's state",
        ),
        (
            lambda state: state["state"][1]["exp_avg"].fill_(math.nan),
            "exp_avg of parameter 1 (model.layers.0.self_attn.q_proj.weight) has an entry that is not finite",
        ),
        (
            lambda state: state["state"][1]["exp_avg_sq"].neg_(),
            "has an entry below zero, and is a mean of squares; no optimizer can go on from it",
        ),
        (
            lambda state: state["state"][0].update(exp_avg=state["state"][0]["exp_avg"].int()),
            "exp_avg of parameter 0 (model.embed_tokens.weight) is int32",
        ),
        (
            lambda state: state["state"][0].update(step=torch.tensor(math.nan)),
            "the step of parameter 0 is tensor(nan); expected how many it has taken",
        ),
        (lambda state: state["param_groups"].append([]), "group 1 has no list of 'params'"),
        (
            lambda state: state["param_groups"][0].update(param_names=["lm_head.weight"]),
            "47 parameters and 1 names of them",
        ),
        (
            lambda state: state["param_groups"][0].update(param_names=["nobody"] * 99),
            "parameter 'nobody' is none of the source's",
        ),
        (
            lambda state: state.update(
                param_groups=[{"params": [n]} for n in state["param_groups"][0]["params"]]
            ),
            "groups without names",
        ),
    ],
)
def test_states_that_do_not_fit(phi_folder: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    model = load_model(phi_folder, dtype="float64", attention="eager")
    state = trained(model).state_dict()
    spoil(state)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match=re.escape(message)):
        grow(phi_folder, tmp_path / "out", target={"intermediate_size": 80}, optimizer=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensor: tensor.fill_(math.nan), "has an entry that is not finite"),
        (lambda tensor: tensor[:1], r"has shape \(1, 24\), and the parameter \(96, 24\)"),
    ],
)
def test_moments_beside_grown_weights_that_are_damaged_are_refused(
    phi_folder: Path, spoil: Any, message: str
) -> None:
    model = load_model(phi_folder, dtype="float64", attention="eager")
    state = trained(model).state_dict()["state"]
    names = [name for name, _ in model.named_parameters()]

    def moment(name: str) -> torch.Tensor:
        kind, _, parameter = name.partition(".")
        tensor: torch.Tensor = state[names.index(parameter)][kind].clone()
        return spoil(tensor) if name == "exp_avg.lm_head.weight" else tensor

    with pytest.raises(UserError, match=rf"optimizer state: exp_avg of lm_head\.weight {message}; no optim"):
        fill(adam(model), model, [f"{kind}.{name}" for kind in ADAM for name in names], moment, 3)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"step": "three"}', '{"step": -1}'])
def test_the_count_beside_grown_moments_is_read_or_refused(
    phi_folder: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "optimizer").mkdir()
    save_file({"exp_avg.a": torch.zeros(1)}, tmp_path / "optimizer" / "model.safetensors")
    (tmp_path / "optimizer" / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"optimizer/state\.json: .*grow anew, or go on without it"):
        load_optimizer(tmp_path, adam(model := load_model(phi_folder)), model)


def test_a_state_that_would_run_code_is_refused(phi_folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state": Trap()}, tmp_path / "optimizer.bin")
    with pytest.raises(UserError, match="cannot be read as a PyTorch file of tensors"):
        grow(
            phi_folder,
            tmp_path / "out",
            target={"intermediate_size": 80},
            optimizer=tmp_path / "optimizer.bin",
        )
    assert not (tmp_path / "sprung").exists()
    for path in (tmp_path / "nowhere", tmp_path):
        (tmp_path / "optimizer.bin").unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"no such file|no optimizer\.bin or optimizer\.pt"):
            grow(phi_folder, tmp_path / "out", target={"intermediate_size": 80}, optimizer=path)
    with pytest.raises(UserError, match="grow with optimizer=FILE"):
        load_optimizer(phi_folder, adam(model := load_model(phi_folder)), model)


def test_workers_agree_on_how_the_state_grows(phi_folder: Path, tmp_path: Path) -> None:
    """The last of them writes it: shards of a growth by another rule are cleared, as those of another plan."""
    model = load_model(phi_folder)
    path = tmp_path / "optimizer.pt"
    torch.save(trained(model).state_dict(), path)
    how: dict[str, Any] = {"target": {"intermediate_size": 80}, "optimizer": path, "max_shard_bytes": 20_000}
    out = tmp_path / "out"
    assert not grow(phi_folder, out, worker="0/2", moments="copied", **how).complete
    assert not grow(phi_folder, out, worker="1/2", moments="own", **how).complete
    assert grow(phi_folder, out, worker="0/2", moments="own", **how).complete
