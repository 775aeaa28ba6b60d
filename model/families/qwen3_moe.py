"""Qwen3 MoE: Qwen3 with routed experts."""

from outgrow.model.mixture import Mixture, register_mixture

MLP = "model.layers.*.mlp"

QWEN3_MOE = register_mixture(
    Mixture(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        of=("qwen3",),
        router=f"{MLP}.gate",
        experts={
            f"{MLP}.{part}": f"{MLP}.experts.#.{part}" for part in ("gate_proj", "up_proj", "down_proj")
        },
        dense_layers="mlp_only_layers",
        aliases=("num_local_experts",),
        adds={"norm_topk_prob": True},
        lacks={"layer_types": None, "max_window_layers": None},
        needs={"use_sliding_window": (False, None)},  # its window is every layer's, Qwen3's that of some
    )
)
