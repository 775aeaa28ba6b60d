"""Llama, Mistral, TinyLlama, SmolLM and others of the same layout: RMSNorm, SwiGLU, grouped-query attention
(GQA), rotary positions.
"""

from outgrow.model.family import Family, register

LLAMA = register(
    Family(
        name="llama",
        norm="rms",
        also=("mistral",),
        whole_heads=("llama",),
        names={"norm_eps": "rms_norm_eps"},
        defaults={"rms_norm_eps": 1e-6},
        schema="""
        model.embed_tokens                       vocab -> residual
        model.layers.*.input_layernorm           norm residual
        model.layers.*.self_attn.q_proj          (kv group qk) <- residual + bias[attention_bias]
        model.layers.*.self_attn.k_proj          (kv qk*) <- residual + bias[attention_bias]
        model.layers.*.self_attn.v_proj          (kv v) <- residual + bias[attention_bias]
        model.layers.*.self_attn.o_proj          residual <- (kv group v) + bias[attention_bias]
        model.layers.*.post_attention_layernorm  norm residual
        model.layers.*.mlp.gate_proj             ffn <- residual + bias[mlp_bias]
        model.layers.*.mlp.up_proj               ffn <- residual + bias[mlp_bias]
        model.layers.*.mlp.down_proj             residual <- ffn + bias[mlp_bias]
        model.norm                               final norm residual
        lm_head                                  vocab <- residual tied to model.embed_tokens.weight if tie_word_embeddings
        """,
    )
)
