"""Phi-3 and Phi-4: as Llama, with queries, keys and values in one matrix and gate and up in another."""

from outgrow.model.family import Family, register

PHI3 = register(
    Family(
        name="phi3",
        norm="rms",
        names={"norm_eps": "rms_norm_eps"},
        schema="""
        model.embed_tokens                       vocab -> residual
        model.layers.*.input_layernorm           norm residual
        model.layers.*.self_attn.qkv_proj        [(kv group qk) | (kv qk*) | (kv v)] <- residual
        model.layers.*.self_attn.o_proj          residual <- (kv group v)
        model.layers.*.post_attention_layernorm  norm residual
        model.layers.*.mlp.gate_up_proj          [ffn | ffn] <- residual
        model.layers.*.mlp.down_proj             residual <- ffn
        model.norm                               final norm residual
        lm_head                                  vocab <- residual tied to model.embed_tokens.weight if tie_word_embeddings
        """,
    )
)
