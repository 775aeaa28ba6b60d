"""Speed and memory at equal numbers: compiled layers, activations that are recomputed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from outgrow.model.base.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from outgrow.train.settings import LoopSettings


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The repeated layers of a Hugging Face network, first to last."""
    return [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]


def speed_up(network: PreTrainedModel, settings: LoopSettings) -> None:
    """Change `network` in place as `settings` ask; names and weights stay as they are.

    checkpointing  each layer keeps its input alone and computes the rest again in the backward pass (arXiv
                   1604.06174): about a third more FLOPs, for activations of one layer instead of all
    compile        each layer on its own, so that one compilation serves them all and a deep network compiles
                   as fast as a shallow one

    Raises:
        UserError: the network's family does not support checkpointing.
    """
    model: Any = network
    if settings.checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"train.checkpointing: {type(network).__name__} does not support it; use "
                "train.checkpointing=false",
            )
        # older name
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if settings.compile:
        for layer in layers_of(network) or [model.base_model]:
            layer.compile()
