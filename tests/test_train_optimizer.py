"""The optimizer's groups cover every parameter exactly once, and decay only matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from model.build import build_model
from train.optimizer import build_optimizer, check_cover, parameter_groups, set_learning_rate
from train.settings import OptimizerSettings

SETTINGS = OptimizerSettings(name="adamw", learning_rate=0.1, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.5)


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    wanted = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_matrices_decay_and_vectors_and_embeddings_do_not(phi_config: dict[str, Any]) -> None:
    model = build_model(phi_config | {"num_hidden_layers": 1}, seed=0)
    decayed, untouched = parameter_groups(model, 0.5)
    layer = "model.layers.0."
    matrices = {f"{layer}{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense")}
    assert names(model, decayed) == matrices | {f"{layer}mlp.fc1.weight", f"{layer}mlp.fc2.weight", "lm_head.weight"}
    assert (decayed["weight_decay"], untouched["weight_decay"]) == (0.5, 0.0)
    assert {"model.embed_tokens.weight", "lm_head.bias", f"{layer}input_layernorm.weight"} <= names(model, untouched)
    assert names(model, decayed) | names(model, untouched) == {name for name, _ in model.named_parameters()}


def test_a_tied_head_is_one_parameter_and_an_embedding(phi_config: dict[str, Any]) -> None:
    model = build_model(phi_config | {"tie_word_embeddings": True}, seed=0)
    decayed, untouched = parameter_groups(model, 0.5)
    assert "model.embed_tokens.weight" in names(model, untouched)
    assert all(p is not model.lm_head.weight for p in decayed["params"])


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
    assert [group["name"] for group in parameter_groups(model, 0.1)] == ["decayed"]


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
