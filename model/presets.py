"""Known geometries: the sizes of published models and of the tiny pair that the demo grows."""

from __future__ import annotations

from typing import Any

from outgrow.model.base.errors import unknown

# What a Phi is apart from its sizes (microsoft/phi-1_5 and microsoft/phi-2, config.json).
_PHI: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "float16",
    "embd_pdrop": 0.0,
    "eos_token_id": None,
    "hidden_act": "gelu_new",
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "pad_token_id": None,
    "qk_layernorm": False,
    "resid_pdrop": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}


def _phi(
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    rotary: float,
    vocab_size: int,
    context: int,
) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_attention_heads,
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary},
    }


# Only sizes: as a growth target they are laid over the source's own config.
PRESETS: dict[str, dict[str, Any]] = {
    "phi_1_5": _phi(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        intermediate_size=8192,
        rotary=0.5,
        vocab_size=51200,
        context=2048,
    ),
    "phi_2": _phi(
        hidden_size=2560,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=10240,
        rotary=0.4,
        vocab_size=51200,
        context=2048,
    ),
    # The same ratios as phi_1_5 → phi_2: width, head dim and ffn × 1.25, depth × 4/3, heads and rotary count
    # fixed.
    "tiny_source": _phi(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        rotary=0.5,
        vocab_size=2048,
        context=256,
    ),
    "tiny_target": _phi(
        hidden_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=320,
        rotary=0.4,
        vocab_size=2048,
        context=256,
    ),
}


def preset_sizes(name: str) -> dict[str, Any]:
    """The sizes of preset `name`, to be laid over a source's config: of its rotary positions, the share
    alone.

    Raises:
        UserError: there is no such preset; the message names near matches.
    """
    if name not in PRESETS:
        unknown("preset", name, PRESETS)
    sizes = dict(PRESETS[name])
    return sizes | {
        "rope_parameters": {"partial_rotary_factor": sizes["rope_parameters"]["partial_rotary_factor"]}
    }


def preset(name: str) -> dict[str, Any]:
    """The whole Hugging Face config of preset `name`.

    Raises:
        UserError: there is no such preset; the message names near matches.
    """
    if name not in PRESETS:
        unknown("preset", name, PRESETS)
    return _PHI | PRESETS[name]
