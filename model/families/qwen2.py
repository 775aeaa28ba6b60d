"""Qwen2 and Qwen2.5: as Llama, with biases on queries, keys and values."""

from outgrow.model.family import Config, Family, register


def window_layers(config: Config) -> list[str]:
    """Find the layers that look back a window only: those from `max_window_layers` on, if
    `use_sliding_window`.
    """
    width = config.get("sliding_window", 4096)
    windowed = config.get("use_sliding_window") and width is not None
    first = config.get("max_window_layers", 28) if windowed else config["num_hidden_layers"]
    return [
        "sliding_attention" if number >= first else "full_attention"
        for number in range(config["num_hidden_layers"])
    ]


QWEN2 = register(
    Family(
        name="qwen2",
        norm="rms",
        names={"norm_eps": "rms_norm_eps"},
        defaults={"rms_norm_eps": 1e-6},
        layer_types=window_layers,
        schema="""
        model.embed_tokens                       vocab -> residual
        model.layers.*.input_layernorm           norm residual
        model.layers.*.self_attn.q_proj          (kv group qk) <- residual + bias
        model.layers.*.self_attn.k_proj          (kv qk*) <- residual + bias
        model.layers.*.self_attn.v_proj          (kv v) <- residual + bias
        model.layers.*.self_attn.o_proj          residual <- (kv group v)
        model.layers.*.post_attention_layernorm  norm residual
        model.layers.*.mlp.gate_proj             ffn <- residual
        model.layers.*.mlp.up_proj               ffn <- residual
        model.layers.*.mlp.down_proj             residual <- ffn
        model.norm                               final norm residual
        lm_head                                  vocab <- residual tied to model.embed_tokens.weight if tie_word_embeddings
        """,
    )
)
