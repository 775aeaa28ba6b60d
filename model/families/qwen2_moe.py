"""Qwen1.5 and Qwen2 MoE: Qwen2 with routed experts and a shared one, which a sigmoid gate multiplies."""

from outgrow.model.mixture import Mixture, register_mixture

MLP = "model.layers.*.mlp"
PARTS = ("gate_proj", "up_proj", "down_proj")

QWEN2_MOE = register_mixture(
    Mixture(
        name="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        of=("qwen2",),
        router=f"{MLP}.gate",
        experts={f"{MLP}.{part}": f"{MLP}.experts.#.{part}" for part in PARTS},
        shared={f"{MLP}.{part}": f"{MLP}.shared_expert.{part}" for part in PARTS},
        shared_units="shared_expert_intermediate_size",
        shared_gate=f"{MLP}.shared_expert_gate",
        dense_layers="mlp_only_layers",
        adds={"norm_topk_prob": True, "qkv_bias": True},
    )
)
