"""Gemma 2: as Gemma, with norms after attention and MLP too, an attention scale fixed in the config, and
capped logits.
"""

from outgrow.model.family import Family, register

GEMMA2 = register(
    Family(
        name="gemma2",
        norm="rms",
        names={"norm_eps": "rms_norm_eps"},
        defaults={
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
        },
        attention_scale="query_pre_attn_scalar",
        whole_heads=("gemma2",),
        layer_types=lambda config: [
            "full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])
        ],
        schema="""
        model.embed_tokens                         vocab -> residual scaled
        model.layers.*.input_layernorm             norm+1 residual
        model.layers.*.self_attn.q_proj            (kv group qk) <- residual + bias[attention_bias]
        model.layers.*.self_attn.k_proj            (kv qk*) <- residual + bias[attention_bias]
        model.layers.*.self_attn.v_proj            (kv v) <- residual + bias[attention_bias]
        model.layers.*.self_attn.o_proj            residual <- (kv group v) + bias[attention_bias]
        model.layers.*.post_attention_layernorm    post norm+1 residual
        model.layers.*.pre_feedforward_layernorm   norm+1 residual
        model.layers.*.mlp.gate_proj               ffn <- residual
        model.layers.*.mlp.up_proj                 ffn <- residual
        model.layers.*.mlp.down_proj               residual <- ffn
        model.layers.*.post_feedforward_layernorm  post norm+1 residual
        model.norm                                 final norm+1 residual
        lm_head                                    vocab <- residual tied to model.embed_tokens.weight if tie_word_embeddings
        """,
    )
)
