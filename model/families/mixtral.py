"""Mixtral: Mistral or Llama with eight experts in every layer, of which a token takes two, their weights
divided by their sum.
"""

from outgrow.model.mixture import Mixture, register_mixture

MLP = "model.layers.*.mlp"
BLOCK = "model.layers.*.block_sparse_moe"

MIXTRAL = register_mixture(
    Mixture(
        name="mixtral",
        architecture="MixtralForCausalLM",
        of=("llama", "mistral"),
        count="num_local_experts",
        units="intermediate_size",
        normalised=True,
        router=f"{BLOCK}.gate",
        experts={
            f"{MLP}.gate_proj": f"{BLOCK}.experts.#.w1",
            f"{MLP}.up_proj": f"{BLOCK}.experts.#.w3",
            f"{MLP}.down_proj": f"{BLOCK}.experts.#.w2",
        },
        lacks={
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "pretraining_tp": None,
            "layer_types": None,
        },
    )
)
