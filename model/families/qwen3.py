"""Qwen3: as Llama, with a norm over each head of queries and keys."""

from outgrow.model.families.qwen2 import window_layers
from outgrow.model.family import Family, register

QWEN3 = register(
    Family(
        name="qwen3",
        norm="rms",
        names={"norm_eps": "rms_norm_eps"},
        defaults={"rms_norm_eps": 1e-6, "head_dim": 128},
        layer_types=window_layers,
        schema="""
        model.embed_tokens                       vocab -> residual
        model.layers.*.input_layernorm           norm residual
        model.layers.*.self_attn.q_proj          (kv group qk) <- residual + bias[attention_bias]
        model.layers.*.self_attn.k_proj          (kv qk*) <- residual + bias[attention_bias]
        model.layers.*.self_attn.v_proj          (kv v) <- residual + bias[attention_bias]
        model.layers.*.self_attn.o_proj          residual <- (kv group v) + bias[attention_bias]
        model.layers.*.self_attn.q_norm          norm qk
        model.layers.*.self_attn.k_norm          norm qk
        model.layers.*.post_attention_layernorm  norm residual
        model.layers.*.mlp.gate_proj             ffn <- residual
        model.layers.*.mlp.up_proj               ffn <- residual
        model.layers.*.mlp.down_proj             residual <- ffn
        model.norm                               final norm residual
        lm_head                                  vocab <- residual tied to model.embed_tokens.weight if tie_word_embeddings
        """,
    )
)
