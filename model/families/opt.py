"""OPT: LayerNorm before each block, ReLU, learned positions (two more than the config says), tied head."""

from outgrow.model.family import Family, register

OPT = register(
    Family(
        name="opt",
        norm="layer",
        names={"intermediate_size": "ffn_dim"},
        defaults={"tie_word_embeddings": True, "enable_bias": True},
        rotary=None,
        lacks=("head_dim", "num_key_value_heads"),
        pos_offset=2,
        follows={"word_embed_proj_dim": "hidden_size"},
        schema="""
        model.decoder.embed_tokens                   vocab -> residual
        model.decoder.embed_positions                pos -> residual
        model.decoder.layers.*.self_attn_layer_norm  norm residual + bias
        model.decoder.layers.*.self_attn.q_proj      (kv group qk) <- residual + bias[enable_bias]
        model.decoder.layers.*.self_attn.k_proj      (kv qk*) <- residual + bias[enable_bias]
        model.decoder.layers.*.self_attn.v_proj      (kv v) <- residual + bias[enable_bias]
        model.decoder.layers.*.self_attn.out_proj    residual <- (kv group v) + bias[enable_bias]
        model.decoder.layers.*.final_layer_norm      norm residual + bias
        model.decoder.layers.*.fc1                   ffn <- residual + bias[enable_bias]
        model.decoder.layers.*.fc2                   residual <- ffn + bias[enable_bias]
        model.decoder.final_layer_norm               final norm residual + bias
        lm_head                                      vocab <- residual tied to model.decoder.embed_tokens.weight if tie_word_embeddings
        """,
    )
)
