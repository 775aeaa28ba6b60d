"""The routers' load-balancing term: against the library's own loss, in every way that a step is computed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from helpers.families import config_of
from helpers.toy import assert_close_run, at, ended, rows
from outgrow.model.build import build_model, to_hf_config
from outgrow.model.geometry import active_parameter_count, parameter_count
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.experts import ExpertLoad
from outgrow.train.loss import NextTokenLoss
from outgrow.train.machine.compile import speed_up
from outgrow.train.router import has_routers, unbalanced
from outgrow.train.settings import Settings
from outgrow.train.start.teacher import TaughtLoss

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
# Experts under the name that each class gives them. The coefficients are far from the defaults, so that a
# forgotten one is seen.
ROUTED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.3},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 20, "router_aux_loss_coef": 0.3},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "router_aux_loss_coef": 0.3},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3},
    "phimoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.3,
        "router_jitter_noise": 0.0,
    },
    "jetmoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "kv_channels": 8,
        "num_key_value_heads": 1,
        "aux_loss_coef": 0.3,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "router_aux_loss_coef": 0.3},
    "ernie4_5_moe": {
        **EXPERTS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "router_aux_loss_coef": 0.3,
    },
}
WINDOWS = torch.randint(2, 61, (3, 17), generator=torch.Generator().manual_seed(0))


def network_of(kind: str, **changes: Any) -> Any:
    network = build_model({"model_type": kind, **SIZES, **ROUTED[kind], **changes}, seed=0, attention="eager")
    with torch.no_grad():
        for parameter in network.parameters():  # routers far from even
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    return network.train()


def gradients(network: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


def library(network: Any, windows: torch.Tensor) -> Any:
    """The class's own loss with its load-balancing term; labels are shifted by nobody, since they are given
    shifted."""
    shifted = windows[:, 1:].contiguous()
    return network(
        input_ids=windows[:, :-1], labels=windows[:, :-1], shift_labels=shifted, output_router_logits=True
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ROUTED)
def test_the_objective_is_the_librarys_loss_in_value_and_every_gradient(kind: str, fused: bool) -> None:
    network = network_of(kind)
    expected = library(network, WINDOWS)
    expected.loss.backward()
    wanted = gradients(network)
    found = NextTokenLoss(network, fused=fused).train()(WINDOWS)
    found.objective.backward()
    assert found.objective.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert found.router.item() == pytest.approx(expected.aux_loss.item(), rel=1e-6)
    assert found.objective.item() - found.text.item() == pytest.approx(
        0.3 * expected.aux_loss.item(), rel=1e-4
    )
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_validation_is_the_plain_token_loss() -> None:
    network = network_of("mixtral").eval()
    with torch.no_grad():
        expected = functional.cross_entropy(
            network(input_ids=WINDOWS[:, :-1]).logits.flatten(0, 1), WINDOWS[:, 1:].flatten()
        ).item()
        found = [NextTokenLoss(network, fused=fused).eval()(WINDOWS).item() for fused in (True, False)]
    assert found == pytest.approx([expected] * 2, rel=1e-6)


def test_pieces_weigh_as_many_tokens_as_they_have() -> None:
    """The sum over two micro-batches is the token-weighted mean of the library's losses of each."""
    network = network_of("mixtral")
    objective = NextTokenLoss(network, fused=True).train()
    pieces = (WINDOWS[:2], WINDOWS[2:])
    total = sum(objective(piece, reduction="sum").objective for piece in pieces).item() / (3 * 16)
    expected = sum(
        share * library(network, piece).loss.item()
        for share, piece in zip((2 / 3, 1 / 3), pieces, strict=True)
    )
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_activation_checkpointing_changes_no_gradient(kind: str) -> None:
    found = []
    for checkpointing in (False, True):
        network = network_of(kind)
        loop = dataclasses.replace(
            compose(["growth=scratch", "target=tiny_target"]).train, checkpointing=checkpointing
        )
        speed_up(network, loop)
        NextTokenLoss(network, fused=True).train()(WINDOWS).objective.backward()
        found.append(gradients(network))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_taught_network_keeps_its_balance() -> None:
    student, teacher = network_of("mixtral"), network_of("mixtral", num_hidden_layers=1)
    objective = TaughtLoss(NextTokenLoss(student, fused=True), teacher).train()
    taught = objective(WINDOWS, weight=0.4, temperature=2.0)
    student.router_aux_loss_coef = 0.0
    without = objective(WINDOWS, weight=0.4, temperature=2.0)
    assert taught.objective.item() - without.objective.item() == pytest.approx(
        0.3 * taught.router.item(), rel=1e-4
    )


@pytest.mark.parametrize("change", [{"router_aux_loss_coef": 0.0}, {"mlp_only_layers": [0, 1]}])
def test_without_a_coefficient_or_experts_the_text_alone_is_trained_on(change: dict[str, Any]) -> None:
    found = NextTokenLoss(network_of("qwen2_moe", **change), fused=True).train()(WINDOWS)
    objective, text = found[:2] if isinstance(found, tuple) else (found, found)
    assert torch.equal(objective, text)


def test_dense_networks_have_no_such_term() -> None:
    network = build_model(config_of("llama"), seed=0)
    assert not has_routers(network)
    assert isinstance(NextTokenLoss(network, fused=True).train()(WINDOWS), torch.Tensor)


def test_routers_without_a_term_are_told() -> None:
    sizes = {
        **SIZES,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
    }
    network = build_model({"model_type": "glm4_moe", **sizes}, seed=0)
    assert not has_routers(network)
    assert "no load-balancing term" in str(unbalanced(network))
    assert unbalanced(network_of("mixtral")) is None
    assert unbalanced(build_model(config_of("llama"), seed=0)) is None


# ---- what experts get --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_an_experts_load_is_what_its_router_chose(kind: str) -> None:
    """Against the experts' own inputs: (tokens, chosen) indices as the class hands them on."""
    network = network_of(kind)
    load, seen = ExpertLoad(network), []
    for name, module in network.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    network(input_ids=torch.arange(24).reshape(2, 12))
    expected = [torch.bincount(chosen.flatten(), minlength=4).tolist() for chosen in seen]
    assert [counts.tolist() for counts in load.counts.values()] == expected
    assert sum(map(sum, expected)) == 2 * 24 * 2

    class Alone:
        def reduce(self, counts: torch.Tensor, reduction: str) -> torch.Tensor:
            return counts

    told = load.row(Alone())
    assert told["expert_load_max"] == pytest.approx(max(map(max, expected)) / 12, abs=1e-4)
    assert told["experts_idle"] == sum(row.count(0) for row in expected)
    load.clear()
    network.eval()(input_ids=torch.arange(24).reshape(2, 12))
    assert load.row(Alone()) == {}


@pytest.mark.parametrize("kind", [*ROUTED, "llama", "bamba"])
def test_active_parameters_leave_out_the_experts_that_a_token_is_not_sent_to(kind: str) -> None:
    own: dict[str, Any] = ROUTED.get(kind, {})
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if kind == "bamba":  # no experts, and kernels of three axes
        own = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    config = to_hf_config(
        {"model_type": kind, **sizes, "num_key_value_heads": 1, "pad_token_id": 0, **own}
    ).to_dict()
    model = build_model(config, seed=0)
    stacks = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim >= 2 and p.shape[0] == 4 and ("expert" in name or p.ndim == 3)
    }
    experts = sum(p.numel() for name, p in stacks.items() if p.ndim == 3) if kind in ROUTED else 0
    assert active_parameter_count(config) == parameter_count(config) - experts // 2
    assert (experts > 0) == (kind in ROUTED)


# ---- runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def routed(overrides: list[str]) -> Settings:
    sizes = {key: value for key, value in SIZES.items() if "token_id" not in key} | {
        "vocab_size": 300,
        **ROUTED["mixtral"],
    }
    target = ",".join(f"{key}:{value}" for key, value in {"model_type": "mixtral", **sizes}.items())
    return compose([*(one for one in overrides if not one.startswith("target=")), f"target={{{target}}}"])


@pytest.mark.slow
def test_a_run_tells_the_term_by_itself(routed: Settings, tmp_path: Path) -> None:
    folder = loop.train(at(routed, tmp_path / "run"))
    trained = rows(folder, "train")
    assert all(1.5 < row["router_loss"] < 3.0 for row in trained)
    assert all("router_loss" not in row for row in rows(folder, "eval"))
    assert json.loads((folder / "run.json").read_text())["target_config"]["router_aux_loss_coef"] == 0.3
    first, start = trained[0]["loss"], rows(folder, "eval")[0]["val_loss"]
    assert first == pytest.approx(start, abs=0.3)  # the text's loss alone: the term would add 0.6


@pytest.mark.slow
def test_two_processes_train_as_one_does_in_the_same_pieces(routed: Settings, tmp_path: Path) -> None:
    """Whole or sharded; a term that is added per process or per piece would be another one."""
    alone = at(routed, tmp_path / "alone", micro_batch=4)
    ended(alone)
    sharded = dataclasses.replace(routed, sharding=dataclasses.replace(routed.sharding, name="full"))
    runs = {name: at(kind, tmp_path / name) for name, kind in (("whole", routed), ("sharded", sharded))}
    ended(*runs.values(), processes=2)
    for name in runs:
        assert_close_run(tmp_path / name, tmp_path / "alone")
