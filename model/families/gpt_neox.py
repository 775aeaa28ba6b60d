"""GPT-NeoX and Pythia: LayerNorm, queries, keys and values fused per head, partial rotary positions, untied
head.
"""

from outgrow.model.family import Family, register

GPT_NEOX = register(
    Family(
        name="gpt_neox",
        norm="layer",
        names={"norm_eps": "layer_norm_eps"},
        defaults={"attention_bias": True},
        rotary=0.25,
        lacks=("head_dim", "num_key_value_heads"),
        rotary_field="rotary_pct",
        ignore=(
            "gpt_neox.layers.*.attention.bias",
            "gpt_neox.layers.*.attention.masked_bias",
            "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
        ),
        schema="""
        gpt_neox.embed_in                            vocab -> residual
        gpt_neox.layers.*.input_layernorm            norm residual + bias
        gpt_neox.layers.*.post_attention_layernorm   norm residual + bias
        gpt_neox.layers.*.attention.query_key_value  (kv [qk | qk* | v]) <- residual + bias[attention_bias]
        gpt_neox.layers.*.attention.dense            residual <- (kv group v) + bias[attention_bias]
        gpt_neox.layers.*.mlp.dense_h_to_4h          ffn <- residual + bias
        gpt_neox.layers.*.mlp.dense_4h_to_h          residual <- ffn + bias
        gpt_neox.final_layer_norm                    final norm residual + bias
        embed_out                                    vocab <- residual tied to gpt_neox.embed_in.weight if tie_word_embeddings
        """,
    )
)
