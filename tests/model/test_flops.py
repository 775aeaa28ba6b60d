"""FLOPs of any class: against PyTorch's counter on real tensors, and against pairs of positions counted by
hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING

from helpers.scripts import script
from outgrow.model.build import meta_model, to_hf_config
from outgrow.model.flops import Count, count, counted
from outgrow.model.geometry import flops_per_token, flops_source, unpaid_flops_per_token
from outgrow.model.twin import tiny_twin

LENGTH = 32
TYPES = [
    "bloom",
    "falcon",
    "gpt2",
    "llama",
    "mpt",
    "glm4_moe_lite",
    "mixtral",
    "hunyuan_v1_moe",
    "ernie4_5_moe",
    "mamba",
]
MORE = [
    "codegen", "gpt_neox", "gptj", "opt", "phi", "stablelm", "deepseek_v2", "deepseek_v3", "minicpm3", "qwen2_moe", "olmoe", "granitemoe",
    "glm4_moe", "dots1", "gpt_oss", "llama4", "gemma3", "gemma4_text", "rembert", "xlnet", "xlm", "xmod", "jetmoe", "dbrx",
    "longcat_flash", "big_bird", "qwen4_exp", "qwen4_exp_text",
]  # fmt: skip
SAID: dict[str, Any] = {
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000.0}},
    "longcat_flash": {"zero_expert_num": 0},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "big_bird": {"is_decoder": True},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "qwen4_exp": {"text_config": {"model_type": "qwen4_exp_text", **script("count_architectures").INDEXED}},
    "qwen4_exp_text": script("count_architectures").INDEXED,
}


def dense(config: dict[str, Any]) -> int:
    """Forward FLOPs of one sequence on real tensors: eager attention, over masked pairs too, and each expert
    on its tokens."""
    network = tiny_twin(config).build(attention="eager").requires_grad_(False)
    if network._can_set_experts_implementation():
        network.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(input_ids=tiny_twin(config).tokens(1, LENGTH), use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", [*TYPES, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)])
def test_the_count_is_the_counters_on_real_tensors(kind: str) -> None:
    config = tiny_twin(to_hf_config({"model_type": kind, **SAID.get(kind, {})}).to_dict()).config
    found = counted(config, LENGTH)
    assert found is not None
    masked = found.attention * (2 * LENGTH / (LENGTH + 1) - 1)  # no window of theirs is as short
    assert (found.total + masked) * LENGTH == pytest.approx(dense(config), rel=1e-9)
    assert flops_per_token(config, LENGTH) == pytest.approx(3 * found.total, rel=1e-9)


def test_experts_that_compute_nothing_take_their_share_of_the_choices() -> None:
    sizes = {
        "hidden_size": 64,
        "expert_ffn_hidden_size": 24,
        "num_layers": 2,
        "n_routed_experts": 4,
        "moe_topk": 3,
    }
    wide = to_hf_config(
        {"model_type": "longcat_flash", **sizes, "zero_expert_num": 0, "vocab_size": 101}
    ).to_dict()
    none, four = counted(wide, 64), counted({**wide, "zero_expert_num": 4}, 64)
    assert none is not None
    assert four is not None
    router = 2 * 64 * 4  # one score more for each of them
    expert = 3 * 2 * 64 * 24
    assert four.matrices == none.matrices + 2 * (router - 3 * expert / 2)
    assert four.attention == none.attention


SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def pairs(context: int, window: int) -> int:
    return sum(min(place + 1, window) for place in range(context))


@pytest.mark.slow
@pytest.mark.parametrize("context", [8, 33, 400])
@pytest.mark.parametrize(
    ("kind", "more", "windowed"),
    [
        ("mistral", {}, 4),
        ("phi3", {}, 4),
        ("gemma2", {"layer_types": ["sliding_attention", "full_attention"] * 2}, 2),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, 3),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            1,
        ),
        ("qwen2", {"use_sliding_window": False}, 0),
        (
            "gpt_oss",
            {
                **ROPE,
                "num_local_experts": 2,
                "num_experts_per_tok": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            2,
        ),
    ],
)
def test_sliding_windows_attend_as_counted_by_hand(
    kind: str, more: dict[str, Any], windowed: int, context: int
) -> None:
    config = to_hf_config(
        {"model_type": kind, **SIZES, "sliding_window": 16, "pad_token_id": 0, **more}
    ).to_dict()
    found = counted(config, context)
    assert found is not None
    per_pair = 2 * 2 * (8 + 8)
    by_hand = per_pair * (windowed * pairs(context, 16) + (4 - windowed) * pairs(context, context)) / context
    assert found.attention == pytest.approx(by_hand, rel=1e-12)
    assert flops_per_token(config, context) == pytest.approx(3 * (found.matrices + by_hand), rel=1e-12)


def test_chunks_attend_within_themselves() -> None:
    layers = ["chunked_attention"] * 3 + ["full_attention"]
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2}
    config = {
        "model_type": "llama4_text",
        **SIZES,
        "attention_chunk_size": 16,
        "layer_types": layers,
        **experts,
        "pad_token_id": 0,
    }
    found = counted(to_hf_config(config).to_dict(), 64)
    assert found is not None
    assert found.attention == pytest.approx(64 * (3 * 4 * pairs(16, 16) + pairs(64, 64)) / 64)


@pytest.mark.slow
def test_a_long_window_is_told_between_its_samples() -> None:
    config = to_hf_config(
        {"model_type": "mistral", **SIZES, "max_position_embeddings": 1 << 17, "sliding_window": 4096}
    ).to_dict()
    found = counted(config, 1 << 15)
    assert found is not None
    assert found.attention == pytest.approx(4 * 64 * pairs(1 << 15, 4096) / (1 << 15), rel=1e-4)


def test_a_built_model_is_left_as_it_was() -> None:
    twin = tiny_twin(to_hf_config({"model_type": "mixtral"}).to_dict())
    network = twin.build(attention="sdpa").train()
    before = {key: value for key, value in vars(network.config).items() if "implementation" in key}
    found = count(network, LENGTH)
    assert found == counted(twin.config, LENGTH)
    assert network.training
    assert {key: value for key, value in vars(network.config).items() if "implementation" in key} == before
    assert isinstance(count(meta_model(twin.config), LENGTH), Count)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roformer", "prophetnet"])
def test_text_without_values_and_the_end_of_the_positions_are_counted_too(kind: str) -> None:
    """RoFormer looks for padding in its text; the last of ProphetNet's positions are its own."""
    assert counted(tiny_twin({"model_type": kind, "is_decoder": True}).config, LENGTH) is not None


def test_two_contexts_take_the_same_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = to_hf_config({"model_type": "mistral", **SIZES, "sliding_window": 11}).to_dict()
    counted(config, 8)
    monkeypatch.setattr("outgrow.model.flops.watch", None)
    found = counted(config, 64)
    assert found is not None
    assert found.attention == pytest.approx(4 * 64 * pairs(64, 11) / 64)


def test_where_nothing_is_counted_the_formula_stays_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_twin(to_hf_config({"model_type": "jetmoe", "vocab_size": 77}).to_dict()).config
    with monkeypatch.context() as patch:
        patch.setattr("outgrow.model.flops._watched", lambda *_: None)  # a class that does not run
        assert counted(config, LENGTH) is None
        assert "nothing was counted" in flops_source(config, LENGTH)
        assert flops_per_token(config, LENGTH) > 0
    mistral = to_hf_config({"model_type": "mistral", **SIZES, "sliding_window": 16}).to_dict()
    assert "counter" in flops_source(mistral, LENGTH)
    llama = to_hf_config({"model_type": "llama", **SIZES}).to_dict()
    assert "formula" in flops_source(llama, LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), [("xlm", 1.0), ("xlnet", 0.91), ("qwen4_exp", 1.0)])
def test_the_formula_over_a_classs_parameters_is_near_the_counter(
    kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a class cannot be counted. XLNet's projections to heads have three axes and are no experts (its
    positions' own projection, over the context once more, is left out); what only pictures reach costs text nothing.
    """
    config = tiny_twin(CONFIG_MAPPING[kind](**SAID.get(kind, {})).to_dict()).config
    monkeypatch.setattr("outgrow.model.flops._watched", lambda *_: None)
    assert counted(config, LENGTH) is None
    assert share * 0.95 < flops_per_token(config, LENGTH) / 3 / (dense(config) / LENGTH) < share * 1.05


@pytest.mark.slow
def test_what_is_frozen_saves_no_more_than_windows_cost() -> None:
    gemma = {
        "model_type": "gemma2",
        **SIZES,
        "sliding_window": 16,
        "layer_types": ["sliding_attention"] * 4,
        "pad_token_id": 0,
    }
    config = to_hf_config(gemma).to_dict()
    names = {name for name, _ in meta_model(config).named_parameters()}
    frozen = {name for name in names if "layers.3" not in name}
    unpaid, found = unpaid_flops_per_token(config, 512, frozen), counted(config, 512)
    assert found is not None
    assert 2 * found.attention * 3 / 4 < unpaid < 2 * found.total
