"""Families and presets against the real transformers classes, counts against published and built models."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from outgrow.model import geometry
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model, to_hf_config
from outgrow.model.config import resolve_target, rotary_share
from outgrow.model.family import Family, families, family_of, register
from outgrow.model.geometry import (
    flops_per_token,
    matmul_parameter_count,
    parameter_count,
    unpaid_flops_per_token,
)
from outgrow.model.presets import PRESETS, preset


def test_the_published_parameter_counts() -> None:
    assert parameter_count(preset("phi_1_5")) == 1_418_270_720
    assert parameter_count(preset("phi_2")) == 2_779_683_840


@pytest.mark.parametrize(
    "change", [{}, {"tie_word_embeddings": True}, {"qk_layernorm": True}, {"num_key_value_heads": 1}]
)
def test_phi_tensors_are_the_built_models(phi_config: dict[str, Any], change: dict[str, Any]) -> None:
    config = phi_config | change
    model = build_model(config, seed=0)
    tensors = {tensor.name: tensor for tensor in family_of(config).tensors(config)}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


def test_the_tiny_pair_has_the_ratios_of_the_published_one() -> None:
    def ratios(source: str, target: str) -> list[float]:
        sizes = [family_of(preset(name)).sizes(preset(name)) for name in (source, target)]
        return [sizes[1][space] / sizes[0][space] for space in ("layer", "residual", "ffn", "kv", "qk", "v")]

    assert (
        ratios("tiny_source", "tiny_target")
        == ratios("phi_1_5", "phi_2")
        == [4 / 3, 1.25, 1.25, 1.0, 1.25, 1.25]
    )


@pytest.mark.parametrize("name", PRESETS)
def test_rotary_dims_are_the_librarys(name: str) -> None:
    config = to_hf_config(preset(name))
    head = config.hidden_size // config.num_attention_heads
    assert family_of(preset(name)).rotary_dims(preset(name)) == int(
        head * config.rope_parameters["partial_rotary_factor"]
    )


def test_flops_are_the_counted_multiplications_of_a_real_forward(phi_config: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    length = 16
    model = build_model(phi_config, seed=0, attention="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long))
    layers, hidden = phi_config["num_hidden_layers"], phi_config["hidden_size"]
    # eager attention computes the masked half too
    counted = counter.get_total_flops() - layers * 2 * 2 * hidden * length * length
    causal = layers * 2 * 2 * hidden * length * (length + 1) // 2
    rotary = sum(
        value
        for key, value in counter.get_flop_counts()["Global"].items()
        if "bmm" not in str(key) and "mm" not in str(key)
    )
    assert rotary == 0
    assert flops_per_token(phi_config, length) * length / 3 == counted + causal


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("learns", "below"),
    [
        (r"model\.layers\.2\.", 2),  # a new layer on top: nothing is passed on below it
        (r"model\.layers\.1\.", 1),
        (r"model\.layers\.[02]\.", 0),
        (r"lm_head|model\.final", 3),  # of a tied head the embedding is frozen, and the head with it
        (r"(?!.*(q_proj|fc2))", 0),
        (r"(?!model\.embed)", 0),
    ],
)
def test_what_is_frozen_costs_what_a_real_backward_pass_says(
    phi_config: dict[str, Any], learns: str, below: int, tied: bool
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    length, config = 16, phi_config | {"tie_word_embeddings": tied}

    def counted(frozen: set[str]) -> int:
        model = build_model(config, seed=0, attention="eager")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(1, length, dtype=torch.long)).logits.sum().backward()
        return counter.get_total_flops()

    names = [name for name, _ in build_model(config, seed=0).named_parameters()]
    frozen = {name for name in names if not re.match(learns, name)}
    # eager attention computes it too
    masked = below * 2 * 2 * 2 * config["hidden_size"] * (length * length - length * (length + 1) // 2)
    assert 0 < len(frozen) < len(names)
    assert unpaid_flops_per_token(config, length, frozen) * length + masked == counted(set()) - counted(
        frozen
    )
    assert unpaid_flops_per_token(config, length, ()) == 0


def test_overrides_keep_the_rotary_count_and_the_key_value_heads(phi_config: dict[str, Any]) -> None:
    grown = resolve_target({"hidden_size": 48}, phi_config)
    assert family_of(grown).rotary_dims(grown) == family_of(phi_config).rotary_dims(phi_config) == 4
    assert (
        resolve_target({"hidden_size": 48, "num_attention_heads": 6}, phi_config)["num_key_value_heads"] == 6
    )
    assert (
        resolve_target({"hidden_size": 48, "partial_rotary_factor": 0.5}, phi_config)["rope_parameters"][
            "partial_rotary_factor"
        ]
        == 0.5
    )


def test_every_rotary_share_truncates_to_its_count() -> None:
    for head in range(2, 257):
        for turned in range(2, head + 1, 2):
            assert int(head * rotary_share(turned, head)) == turned


def test_a_target_may_be_a_preset_a_dict_a_config_or_a_folder(
    phi_config: dict[str, Any], phi_folder: Any
) -> None:
    assert resolve_target("phi_2")["hidden_size"] == 2560
    assert resolve_target(to_hf_config(phi_config))["hidden_size"] == 24
    assert resolve_target(phi_folder)["hidden_size"] == 24
    assert resolve_target("tiny_target", phi_config)["hidden_act"] == phi_config["hidden_act"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("phi_3", r"unknown target 'phi_3'.*did you mean 'phi_2'"),
        ("hidden_size:96", r"unknown target.*quotes around them: 'target=\{hidden_size:96,…\}'"),
        ({"hiden_size": 48}, r"unknown config key 'hiden_size'; did you mean 'hidden_size'"),
        ({"model_type": "llama"}, r"a family grows into itself only"),
    ],
)
def test_wrong_targets_are_told_with_near_matches(
    phi_config: dict[str, Any], target: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_target(target, phi_config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "cannot divide hidden_size into 5 heads"),
        ({"num_key_value_heads": 2}, "cannot divide 3 query heads among 2 key-value heads"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number, found None"),
        ({"hidden_size": "24"}, "hidden_size must be a positive whole number, found '24'"),
        ({"model_type": "phy"}, "unknown model family 'phy'; did you mean 'phi'"),
    ],
)
def test_wrong_configs_are_told(phi_config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    config = phi_config | change
    with pytest.raises(UserError, match=message):
        family_of(config).sizes(config)


def test_a_family_may_be_registered_and_its_spaces_are_checked() -> None:
    with pytest.raises(ValueError, match="names the space 'residue'"):
        register(Family(name="mine", norm="rms", schema="head vocab <- residue"))
    assert "mine" not in families()


def test_building_does_not_touch_the_global_random_state(phi_config: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    first, second = (build_model(phi_config, seed=3).state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi", "llama", "gpt2", "gemma2"])
def test_without_a_schema_the_librarys_class_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = to_hf_config({"model_type": name}).to_dict()
    expected = parameter_count(config), matmul_parameter_count(config), flops_per_token(config, 64)
    monkeypatch.setattr(geometry, "has_schema", lambda _: False)
    assert (
        parameter_count(config),
        matmul_parameter_count(config),
        flops_per_token(config, 64),
    ) == pytest.approx(expected, rel=1e-12)


def test_of_a_stack_of_experts_those_count_that_a_token_is_sent_to() -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = {
        "model_type": "mixtral",
        "vocab_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **sizes,
    }
    attention, router, expert, head = 4 * 16 * 16, 4 * 16, 3 * 16 * 24, 32 * 16
    assert matmul_parameter_count(config) == attention + router + 2 * expert + head
    assert parameter_count(config) == attention + router + 4 * expert + 2 * head + 3 * 16
