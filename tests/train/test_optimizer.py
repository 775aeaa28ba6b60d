"""The optimizer's groups cover every parameter exactly once, and decay only matrices."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model
from outgrow.train import muon
from outgrow.train.optimizer import (
    OPTIMIZERS,
    build_optimizer,
    check_cover,
    parameter_groups,
    set_learning_rate,
)
from outgrow.train.settings import OptimizerSettings

SETTINGS = OptimizerSettings(
    name="adamw", learning_rate=0.1, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.5
)


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    wanted = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_matrices_decay_and_vectors_and_embeddings_do_not(phi_config: dict[str, Any]) -> None:
    model = build_model(phi_config | {"num_hidden_layers": 1}, seed=0)
    hidden, decayed, untouched = parameter_groups(model, 0.5)
    layer = "model.layers.0."
    matrices = {
        f"{layer}{part}.weight"
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense")
    }
    assert names(model, hidden) == matrices | {f"{layer}mlp.fc1.weight", f"{layer}mlp.fc2.weight"}
    assert names(model, decayed) == {"lm_head.weight"}
    assert [group["weight_decay"] for group in (hidden, decayed, untouched)] == [0.5, 0.5, 0.0]
    assert {"model.embed_tokens.weight", "lm_head.bias", f"{layer}input_layernorm.weight"} <= names(
        model, untouched
    )
    assert names(model, hidden) | names(model, decayed) | names(model, untouched) == {
        name for name, _ in model.named_parameters()
    }


def test_a_tied_head_is_one_parameter_and_an_embedding(phi_config: dict[str, Any]) -> None:
    model = build_model(phi_config | {"tie_word_embeddings": True}, seed=0)
    hidden, untouched = parameter_groups(model, 0.5)
    assert "model.embed_tokens.weight" in names(model, untouched)
    assert all(p is not model.lm_head.weight for p in hidden["params"])


def test_a_gap_and_an_overlap_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    everything = list(model.parameters())
    check_cover(model, [{"params": everything}])
    with pytest.raises(AssertionError, match=r"'1\.bias': 0"):
        check_cover(model, [{"params": everything[:-1]}])
    with pytest.raises(AssertionError, match=r"'0\.weight': 2"):
        check_cover(model, [{"params": everything}, {"params": everything[:1]}])


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(model, 0.1)] == ["hidden"]


def test_without_a_gradient_only_decayed_weights_shrink() -> None:
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    optimizer = build_optimizer(model, SETTINGS)
    set_learning_rate(optimizer, 0.2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model.weight.flatten().tolist() == pytest.approx([0.9] * 4)  # 1 − rate · decay = 1 − 0.2 · 0.5
    assert model.bias.tolist() == [1.0, 1.0]


# ---- AdamW in one kernel -----------------------------------------------------------------------------------


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> nn.Module:
    """`steps` updates with gradients that are a function of the step alone."""
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_adamw_runs_in_one_kernel_and_computes_adamw(phi_config: dict[str, Any]) -> None:
    model = build_model(phi_config, seed=0)
    reference = copy.deepcopy(model)
    optimizer = build_optimizer(model, SETTINGS)
    assert all(group["fused"] for group in optimizer.param_groups)
    groups = [{**group, "fused": False} for group in parameter_groups(reference, 0.5)]
    trained(model, optimizer, 3)
    trained(reference, torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8, foreach=False), 3)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- Muon --------------------------------------------------------------------------------------------------

MUON = dataclasses.replace(SETTINGS, name="muon", momentum=0.95, learning_rate=0.01)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's Muon, the reference, iterates in bfloat16, which a CPU multiplies in a slow loop."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def test_muon_trains_hidden_matrices_and_adamw_the_rest(phi_config: dict[str, Any]) -> None:
    """Against PyTorch's own two optimizers, side by side."""
    model = build_model(phi_config, seed=0)
    reference = copy.deepcopy(model)
    trained(model, build_optimizer(model, MUON), 3)
    hidden, *rest = parameter_groups(reference, 0.5)
    muon = torch.optim.Muon([hidden], lr=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        for parameter in reference.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        muon.step()
        adamw.step()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_muons_first_step_is_orthogonal_and_as_large_as_adamws(phi_config: dict[str, Any]) -> None:
    """All singular values of the update near 0.2 · √max(rows, columns) · rate (arXiv 2502.16982, equation 4):
    an RMS of 0.2 · rate."""
    model = build_model(phi_config, seed=0)
    weight: Any = model.model.layers[0].mlp.fc1.weight
    before = weight.detach().clone()
    trained(model, build_optimizer(model, dataclasses.replace(MUON, weight_decay=0.0)), 1)
    update = (weight.detach() - before) / 0.01
    values = torch.linalg.svdvals(update) / (0.2 * math.sqrt(max(update.shape)))
    assert 0.6 < values.min() <= values.max() < 1.3  # Newton–Schulz comes only near 1
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_saved_and_loaded_goes_on_bit_identically(phi_config: dict[str, Any], name: Any) -> None:
    settings = dataclasses.replace(MUON, name=name)
    whole = build_model(phi_config, seed=0)
    trained(whole, build_optimizer(whole, settings), 4)
    broken = build_model(phi_config, seed=0)
    first = build_optimizer(broken, settings)
    trained(broken, first, 2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build_optimizer(broken, settings)
    second.load_state_dict(torch.load(file, weights_only=True))
    trained(broken, second, 2, first=2)
    for ours, theirs in zip(broken.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("together", [1, 2 * 6 * 4, 2**20])
def test_matrices_of_one_shape_are_orthogonalised_together_as_each_alone(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Against PyTorch's Muon, tall, wide and square, in stacks of one, of two and of all."""
    monkeypatch.setattr(muon, "TOGETHER", together)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4), (4, 6), (6, 4)]
    draw = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    stacks = list(muon.alike(ours))
    assert sorted(itertools.chain(*stacks)) == list(range(7))
    assert max(map(len, stacks)) == {1: 1, 48: 2, 2**20: 4}[together]
    options = {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.5, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = muon.Muon([{"params": ours, "weight_decay": 0.5}], MUON), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=draw)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_matrix_that_processes_share_is_orthogonalised_alone_to_the_same_step() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        draw = torch.Generator().manual_seed(0)
        plain = [torch.randn(6, 4, generator=draw) for _ in range(4)]
        shared = [distribute_tensor(tensor.clone(), mesh, [Shard(0)]) for tensor in plain]
        group = {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.5}
        for one, other, *rest in (plain, shared):
            muon.muon_step([one, other], list(rest), [torch.zeros_like(one) for _ in range(2)], group)
        for one, other in zip(plain, shared, strict=True):
            torch.testing.assert_close(one, other.full_tensor(), rtol=1e-6, atol=1e-6)
        stack, gradient = torch.stack(plain[:2]), torch.stack(plain[2:])
        alone = nn.Parameter(stack.clone())
        alone.grad = gradient.clone()
        parts = nn.Parameter(distribute_tensor(stack, mesh, [Shard(0)]))
        parts.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        for weight in (alone, parts):
            muon.StackedMuon([{"params": [weight], "weight_decay": 0.5}], MUON).step()
        torch.testing.assert_close(alone.detach(), parts.detach().full_tensor())  # type: ignore[attr-defined]
    finally:
        torch.distributed.destroy_process_group()


def test_a_rate_set_on_muon_reaches_both_parts(phi_config: dict[str, Any]) -> None:
    model = build_model(phi_config, seed=0)
    optimizer = build_optimizer(model, MUON)
    set_learning_rate(optimizer, 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    trained(model, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# ---- 8 bits ------------------------------------------------------------------------------------------------


def test_without_torchao_8_bits_are_refused_naming_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def absent(name: str, *more: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError(name)
        return load(name, *more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"torchao's, which is not installed; pip install -e '\.\[low-bit\]'"):
        build_optimizer(nn.Linear(2, 2), dataclasses.replace(SETTINGS, name="adamw_8bit"))


def test_8_bits_take_a_quarter_of_the_memory_and_train_alike() -> None:
    pytest.importorskip("torchao.optim", reason="torchao is an extra")

    def losses(name: Any) -> tuple[list[float], int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        optimizer = build_optimizer(
            model, dataclasses.replace(SETTINGS, name=name, learning_rate=3e-3, weight_decay=0.0)
        )
        inputs, found = torch.randn(256, 64), []
        for _ in range(30):
            loss = (model(inputs) - inputs.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        return found, file.getbuffer().nbytes

    (exact, whole), (rounded, small) = losses("adamw"), losses("adamw_8bit")
    assert small < 0.35 * whole
    assert rounded[-1] == pytest.approx(exact[-1], rel=0.05)
    assert exact[-1] < 0.5 * exact[0]


def test_every_name_of_the_door_has_an_optimizer() -> None:
    from typing import get_args, get_type_hints

    assert set(get_args(get_type_hints(OptimizerSettings)["name"])) == set(OPTIMIZERS)


def test_muon_orthogonalises_each_experts_matrix_by_itself() -> None:
    """Against PyTorch's Muon over the same matrices apart."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = build_model(
        {"model_type": "mixtral", **sizes, "num_key_value_heads": 2, "num_local_experts": 3}, seed=0
    )
    groups = {group["name"]: names(model, group) for group in parameter_groups(model, 0.5)}
    assert groups["experts"] == {
        f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")
    }
    optimizer = build_optimizer(model, MUON)
    stack = model.model.layers[0].mlp.experts.down_proj
    apart = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    reference = torch.optim.Muon(
        apart, lr=0.01, momentum=0.95, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(2):
        draw = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        for matrix, gradient in zip(apart, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in apart]))


def test_convolutions_and_state_spaces_decay_nowhere() -> None:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "state_size": 4,
        "time_step_rank": 2,
    }
    model = build_model({"model_type": "mamba", **sizes}, seed=0)
    groups = {group["name"]: names(model, group) for group in parameter_groups(model, 0.5)}
    mixer = "backbone.layers.0.mixer."
    assert {mixer + "conv1d.weight", mixer + "A_log", mixer + "D"} <= groups["untouched"]
    assert {mixer + "in_proj.weight", mixer + "out_proj.weight", mixer + "x_proj.weight"} <= groups["hidden"]
