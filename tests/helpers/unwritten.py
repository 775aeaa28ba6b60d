"""Tiny configs of families that have no schema here."""

from __future__ import annotations

from typing import Any

from outgrow.model.build import to_hf_config

TINY = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
STRANGERS: dict[str, dict[str, Any]] = {
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 3, "max_seq_len": 32},
    "falcon": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3},
    "bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 3},
    "starcoder2": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
    },
    "stablelm": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
    },
    "cohere": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
    },
}
EXPERTS: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2,
        "intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4,
    },
    "mixtral": {
        "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "intermediate_size": 12,
        "num_local_experts": 3, "num_experts_per_tok": 2,
    },
}  # fmt: skip


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return to_hf_config({"model_type": name, **TINY, **(STRANGERS | EXPERTS)[name], **changes}).to_dict()
