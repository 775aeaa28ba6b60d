"""Tiny configs of every family with a schema, and targets that grow them one axis at a time."""

from __future__ import annotations

from typing import Any

from outgrow.model.build import to_hf_config
from outgrow.model.family import families

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24, "pad_token_id": 1},
    "gemma": {"head_dim": 6},
    "gemma2": {
        "head_dim": 6,
        "query_pre_attn_scalar": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
    "qwen3": {"head_dim": 6},
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67}
    },
    "phi": {
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67},
    },
}
MULTI_HEAD = ("gpt2", "opt", "gpt_neox", "phi")
FLOOR = {"layer": 1e-12, "rms": 2e-5}  # the library's RMSNorms compute in float32


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    fields = {**SIZES, **MORE.get(name, {}), **changes}
    if name in ("gpt2", "opt", "gpt_neox"):
        fields.pop("num_key_value_heads", None)
    if name == "gpt2":
        fields = {
            key: value
            for key, value in fields.items()
            if key not in ("hidden_size", "intermediate_size", "num_hidden_layers")
        }
        fields = {
            key: value
            for key, value in fields.items()
            if key not in ("num_attention_heads", "max_position_embeddings")
        }
    return to_hf_config({"model_type": name, **fields}).to_dict()


def renamed(name: str, sizes: dict[str, int]) -> dict[str, int]:
    family = families()[name]
    return {family.field_name(key): value for key, value in sizes.items()}


FAMILIES = sorted({family.name for family in families().values()})


def growths(name: str) -> dict[str, dict[str, int]]:
    """Targets that grow one axis each, and all at once; head dims only where part of a head is turned."""
    more_heads = {"num_attention_heads": 10, **({} if name in MULTI_HEAD else {"num_key_value_heads": 5})}
    wider = (
        {"hidden_size": 60, **more_heads}
        if name in MULTI_HEAD
        else {"hidden_size": 30 if name.startswith("gemma") else 60, **more_heads}
    )
    if name == "olmo2":  # its norm over all heads sees copies of heads only if all are copied alike
        wider = {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
    return {
        "width": wider,
        "ffn": {"intermediate_size": 57},
        "depth": {"num_hidden_layers": 5},
        "vocab": {"vocab_size": 64},
        "all": {**wider, "intermediate_size": 81, "num_hidden_layers": 3, "vocab_size": 63},
    }
