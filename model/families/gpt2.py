"""GPT-2: LayerNorm, learned positions, Conv1D matrices stored (in, out), queries, keys and values in one,
tied head.
"""

from outgrow.model.family import Family, register

GPT2 = register(
    Family(
        name="gpt2",
        norm="layer",
        names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "norm_eps": "layer_norm_epsilon",
        },
        defaults={"tie_word_embeddings": True, "scale_attn_weights": True},
        rotary=None,
        scaled_if="scale_attn_weights",
        small_writers=True,
        lacks=("head_dim", "num_key_value_heads"),
        ignore=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
        schema="""
        transformer.wte              vocab -> residual
        transformer.wpe              pos -> residual
        transformer.h.*.ln_1         norm residual + bias
        transformer.h.*.attn.c_attn  residual -> [(kv group qk) | (kv qk*) | (kv v)] + bias
        transformer.h.*.attn.c_proj  (kv group v) -> residual + bias
        transformer.h.*.ln_2         norm residual + bias
        transformer.h.*.mlp.c_fc     residual -> ffn + bias
        transformer.h.*.mlp.c_proj   ffn -> residual + bias
        transformer.ln_f             final norm residual + bias
        lm_head                      vocab <- residual tied to transformer.wte.weight if tie_word_embeddings
        """,
    )
)
