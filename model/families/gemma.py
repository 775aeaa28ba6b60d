"""Gemma: RMSNorm stored minus one, embeddings multiplied by sqrt(hidden), a head dim of its own, tied
head."""

from outgrow.model.family import Family, register

GEMMA = register(
    Family(
        name="gemma",
        norm="rms",
        names={"norm_eps": "rms_norm_eps"},
        defaults={"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256},
        schema="""
        model.embed_tokens                       vocab -> residual scaled
        model.layers.*.input_layernorm           norm+1 residual
        model.layers.*.self_attn.q_proj          (kv group qk) <- residual + bias[attention_bias]
        model.layers.*.self_attn.k_proj          (kv qk*) <- residual + bias[attention_bias]
        model.layers.*.self_attn.v_proj          (kv v) <- residual + bias[attention_bias]
        model.layers.*.self_attn.o_proj          residual <- (kv group v) + bias[attention_bias]
        model.layers.*.post_attention_layernorm  norm+1 residual
        model.layers.*.mlp.gate_proj             ffn <- residual
        model.layers.*.mlp.up_proj               ffn <- residual
        model.layers.*.mlp.down_proj             residual <- ffn
        model.norm                               final norm+1 residual
        lm_head                                  vocab <- residual tied to model.embed_tokens.weight if tie_word_embeddings
        """,
    )
)
