"""Phi-1, Phi-1.5, Phi-2: attention and MLP in parallel behind one LayerNorm, partial rotary positions, biases
everywhere.
"""

from outgrow.model.family import Family, register

PHI = register(
    Family(
        name="phi",
        norm="layer",
        names={"norm_eps": "layer_norm_eps"},
        rotary=0.5,
        schema="""
        model.embed_tokens                  vocab -> residual
        model.layers.*.input_layernorm      norm residual + bias
        model.layers.*.self_attn.q_proj     (kv group qk) <- residual + bias
        model.layers.*.self_attn.k_proj     (kv qk*) <- residual + bias
        model.layers.*.self_attn.v_proj     (kv v) <- residual + bias
        model.layers.*.self_attn.dense      residual <- (kv group v) + bias
        model.layers.*.self_attn.q_layernorm  norm qk + bias if qk_layernorm
        model.layers.*.self_attn.k_layernorm  norm qk + bias if qk_layernorm
        model.layers.*.mlp.fc1              ffn <- residual + bias
        model.layers.*.mlp.fc2              residual <- ffn + bias
        model.final_layernorm               final norm residual + bias
        lm_head                             vocab <- residual + bias tied to model.embed_tokens.weight if tie_word_embeddings
        """,
    )
)
