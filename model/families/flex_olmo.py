"""FlexOlmo: OLMo 2 with experts in every layer (2507.07024)."""

from outgrow.model.mixture import Mixture, register_mixture

MLP = "model.layers.*.mlp"

FLEX_OLMO = register_mixture(
    Mixture(
        name="flex_olmo",
        architecture="FlexOlmoForCausalLM",
        of=("olmo2",),
        units="intermediate_size",
        router=f"{MLP}.gate",
        experts={
            f"{MLP}.{part}": f"{MLP}.experts.#.{part}" for part in ("gate_proj", "up_proj", "down_proj")
        },
        adds={"norm_topk_prob": True},
        lacks={"layer_types": None},
    )
)
