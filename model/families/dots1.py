"""dots.llm1: Qwen3's attention, DeepSeek-V3's experts: sigmoid scores, a correction for choosing, a shared
expert, dense layers first.
"""

from outgrow.model.mixture import Mixture, register_mixture

MLP = "model.layers.*.mlp"
PARTS = ("gate_proj", "up_proj", "down_proj")

DOTS1 = register_mixture(
    Mixture(
        name="dots1",
        architecture="Dots1ForCausalLM",
        of=("qwen3",),
        count="n_routed_experts",
        router=f"{MLP}.gate",
        experts={f"{MLP}.{part}": f"{MLP}.experts.#.{part}" for part in PARTS},
        shared={f"{MLP}.{part}": f"{MLP}.shared_experts.{part}" for part in PARTS},
        shared_of="n_shared_experts",
        softmax=False,
        scaled="routed_scaling_factor",
        correction=f"{MLP}.gate.e_score_correction_bias",
        dense_layers="first_k_dense_replace",
        adds={"norm_topk_prob": True, "n_group": 1, "topk_group": 1},
        lacks={"use_sliding_window": (False, None)},
        needs={"n_group": (1,)},
    )
)
