"""Configs as they were published: sizes of real checkpoints, planned from the config and the headers of a
file that holds no numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

from outgrow.growth import grow, plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import to_hf_config
from outgrow.model.derive import shapes, whole_config

GLM_4_5_AIR = {  # with 8 of its 128 experts, which are alike
    "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "head_dim": 128, "moe_intermediate_size": 1408, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5, "attention_bias": True, "use_qk_norm": False,
    "vocab_size": 151552, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "rope_theta": 1000000,
    "max_position_embeddings": 131072, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
DBRX = {
    "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768, "vocab_size": 100352,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    "torch_dtype": "bfloat16",
}  # fmt: skip
BAMBA_9B = {
    "model_type": "bamba", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "attn_layer_indices": [9, 18, 27], "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_n_groups": 1,
    "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2, "vocab_size": 128256, "torch_dtype": "bfloat16",
}  # fmt: skip
CODESTRAL_MAMBA = {
    "model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64, "n_groups": 8,
    "state_size": 128, "expand": 2, "vocab_size": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip
CODEGEN_2B = {
    "model_type": "codegen", "n_embd": 2560, "n_head": 32, "n_layer": 32, "n_positions": 2048, "n_ctx": 2048, "rotary_dim": 64,
    "vocab_size": 51200, "torch_dtype": "float16",
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name → config, what it grows into
    "DBRX": (DBRX, {"d_model": 12288, "n_heads": 96}),
    "Bamba-9B": (
        BAMBA_9B,
        {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 16, "mamba_n_heads": 256},
    ),
    "Codestral-Mamba": (CODESTRAL_MAMBA, {"hidden_size": 8192, "num_heads": 256}),
    "CodeGen-2B": (CODEGEN_2B, {"n_embd": 5120, "n_head": 64}),
}


def hollow_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> Path:
    """A checkpoint whose header says everything and whose numbers are a hole in the file, so that it takes no
    room on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, offset := offset + 2 * prod(shape)],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + offset)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_is_planned_from_its_headers(tmp_path: Path, name: str) -> None:
    config, target = PUBLISHED[name]
    source = hollow_checkpoint(tmp_path / "source", config, shapes(whole_config(config)))
    made = plan(source, target)
    assert made.certificate.lossless, made.certificate.reasons
    assert {step.name: step.shape for step in made.steps} == shapes(made.target_config)


@pytest.mark.slow
def test_layers_for_further_tokens_are_left_out_as_the_library_leaves_them(tmp_path: Path) -> None:
    """GLM-4.5's files have one layer more than its config says, which predicts the token after the next."""
    built = shapes(whole_config(GLM_4_5_AIR))
    extra = {"model.layers.46.embed_tokens.weight": (151552, 4096), "model.layers.46.enorm.weight": (4096,)}
    source = hollow_checkpoint(tmp_path / "source", GLM_4_5_AIR, built | extra)
    wider = plan(source, {"hidden_size": 5120, "moe_intermediate_size": 1536})
    assert wider.certificate.lossless, wider.certificate.reasons
    for made in (wider, plan(source, {"num_hidden_layers": 50}, depth="top")):
        assert any("left out: model.layers.46.embed_tokens.weight" in note for note in made.notes)
        assert {step.name: step.shape for step in made.steps} == shapes(made.target_config)


SMALL = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_expand": 2}
HEADS = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
EXPERTS = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}

GROWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # model type → tiny config, what it grows into
    "glm4_moe": (
        {**HEADS, **EXPERTS, "head_dim": 10, "intermediate_size": 24, "num_hidden_layers": 3, "attention_bias": True},
        {"hidden_size": 22, "num_attention_heads": 6, "num_key_value_heads": 3, "moe_intermediate_size": 17},
    ),
    "dots1": (
        {**HEADS, **EXPERTS, "intermediate_size": 24, "num_hidden_layers": 3, "num_key_value_heads": 2, "first_k_dense_replace": 1},
        {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "moe_intermediate_size": 17},
    ),
    "dbrx": (
        {
            "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32,
            "attn_config": {"clip_qkv": 1, "kv_n_heads": 2, "rope_theta": 500000},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
        {"d_model": 48, "n_heads": 6, "n_layers": 3},
    ),
    "bamba": (
        {**HEADS, **STATES, "num_hidden_layers": 3, "intermediate_size": 24, "attn_layer_indices": [1]},
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8, "intermediate_size": 30},
    ),
    "granitemoehybrid": (
        {**HEADS, **STATES, "num_hidden_layers": 3, "intermediate_size": 24, "shared_intermediate_size": 20, "num_local_experts": 4,
         "layer_types": ["mamba", "attention", "mamba"], "mamba_n_groups": 2},
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8, "shared_intermediate_size": 30},
    ),
    "mamba2": (  # heads in two groups
        {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "n_groups": 2, "state_size": 6},
        {"hidden_size": 32, "num_heads": 8, "num_hidden_layers": 3},
    ),
    "codegen": (
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 32, "n_ctx": 32},
        {"n_embd": 64, "n_head": 8, "n_layer": 3},
    ),
    "lfm2": (
        {**HEADS, "num_hidden_layers": 3, "intermediate_size": 24, "layer_types": ["conv", "full_attention", "conv"]},
        {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 4},
    ),
    "deepseek_v4": (
        {
            **HEADS, **EXPERTS, "num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 3, "q_lora_rank": 6, "o_groups": 2,
            "o_lora_rank": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 2, "partial_rotary_factor": 0.5,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        },
        {"hidden_size": 22, "moe_intermediate_size": 17},
    ),
    "bailing_hybrid": (
        {**HEADS, **EXPERTS, "num_key_value_heads": 2, "intermediate_size": 24, "num_hidden_layers": 5, "kv_lora_rank": 6,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6, "n_group": 1, "topk_group": 1, "layer_group_size": 2,
         "num_experts": 4, "num_experts_per_token": 2},
        {"hidden_size": 22, "moe_intermediate_size": 17},
    ),
    "gemma3n_text": (  # its class multiplies by powers of the hidden size in three places
        {**HEADS, "head_dim": 8, "num_hidden_layers": 4, "intermediate_size": 24, "num_kv_shared_layers": 2, "laurel_rank": 4,
         "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 61, "altup_num_inputs": 3, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
         "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
        {"hidden_size": 48},
    ),
    "zaya": (  # a convolution over queries and keys
        {**HEADS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3, "num_experts": 4,
         "moe_intermediate_size": 12, "router_hidden_size": 10},
        {"hidden_size": 32, "moe_intermediate_size": 17},
    ),
    "longcat_flash": (  # latent vectors multiplied by sqrt(hidden size / rank)
        {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 12,
         "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "q_lora_rank": 6, "kv_lora_rank": 4, "qk_rope_head_dim": 4,
         "head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6},
        {"hidden_size": 22, "num_attention_heads": 3, "expert_ffn_hidden_size": 17},
    ),
    "xglm": (
        {"d_model": 16, "attention_heads": 2, "num_layers": 2, "ffn_dim": 24, "max_position_embeddings": 32},
        {"ffn_dim": 31, "num_layers": 3},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWN)
def test_a_published_family_grows_losslessly(tmp_path: Path, checkpoint_maker: Any, name: str) -> None:
    config, target = GROWN[name]
    source = checkpoint_maker(
        tmp_path / "source", to_hf_config({"model_type": name, **SMALL, **config}).to_dict()
    )
    grown = grow(source, tmp_path / "out", target=target, noise=0.2)
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt.max_logit > 0.1
    assert grown.receipt.max_delta <= 2e-5 * max(1, grown.receipt.max_logit)


REFUSED: dict[str, dict[str, Any]] = {name: config for name, (config, _) in GROWN.items()} | {
    "recurrent_gemma": {**HEADS, "num_hidden_layers": 3, "intermediate_size": 24},
    "roc_bert": {
        **HEADS,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 6,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            "recurrent_gemma",
            {"hidden_size": 32, "num_attention_heads": 4},
            r"model\.normalizer, which .* from hidden_size, is rounded",
        ),
        (
            "roc_bert",
            {"hidden_size": 32, "num_attention_heads": 4},
            r"map_inputs_layer\.weight would become .* where transformers' class wants",
        ),
        (
            "xglm",
            {"d_model": 32},
            r"model\.embed_positions\.weights is in no file: transformers computes it from d_model",
        ),
        (
            "bamba",
            {"hidden_size": 24, "num_attention_heads": 3, "mamba_n_heads": 6},
            "mamba.norm normalises over it",
        ),
        # wider heads would be clipped otherwise
        ("dbrx", {"d_model": 48}, "logits of a tiny random model move by"),
    ],
)
def test_what_a_published_family_cannot_do_is_told(
    tmp_path: Path, name: str, target: dict[str, Any], message: str
) -> None:
    config = to_hf_config({"model_type": name, **SMALL, **REFUSED[name]}).to_dict()
    with pytest.raises(UserError, match=message):
        plan(config, target)
