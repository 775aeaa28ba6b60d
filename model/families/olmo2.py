"""OLMo 2: no norm before attention and MLP, one after each; queries and keys normalised over all heads
together.
"""

from outgrow.model.family import Family, register

OLMO2 = register(
    Family(
        name="olmo2",
        norm="rms",
        names={"norm_eps": "rms_norm_eps"},
        schema="""
        model.embed_tokens                         vocab -> residual
        model.layers.*.self_attn.q_proj            (kv group qk) <- residual + bias[attention_bias]
        model.layers.*.self_attn.k_proj            (kv qk*) <- residual + bias[attention_bias]
        model.layers.*.self_attn.v_proj            (kv v) <- residual + bias[attention_bias]
        model.layers.*.self_attn.o_proj            residual <- (kv group v) + bias[attention_bias]
        model.layers.*.self_attn.q_norm            norm (kv group qk)
        model.layers.*.self_attn.k_norm            norm (kv qk)
        model.layers.*.post_attention_layernorm    post norm residual
        model.layers.*.mlp.gate_proj               ffn <- residual
        model.layers.*.mlp.up_proj                 ffn <- residual
        model.layers.*.mlp.down_proj               residual <- ffn
        model.layers.*.post_feedforward_layernorm  post norm residual
        model.norm                                 final norm residual
        lm_head                                    vocab <- residual tied to model.embed_tokens.weight if tie_word_embeddings
        """,
    )
)
