"""The null control of a growth in width: the source itself, its norms handing on more, and no bigger.

A norm over N entries, n of them the source's and the others zero, hands on √(N/n) times what the source's
norm does. So a wider network whose new entries are dead is the source with another effective learning rate:
where it ends below a growth, the growth has shown nothing. `growth=null_control` trains that at the source's
cost; `zero_pad` is the same function in the target's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from outgrow.growth.planning import wanted_config
from outgrow.model.base.errors import UserError
from outgrow.model.build import known_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from outgrow.train.settings import Settings

OPTION = "norm_gain"  # of the operator source


def norm_gain(settings: Settings, config: Mapping[str, Any]) -> float:
    """√(N/n) from the target's hidden size and that of the source's `config`; 1 for a run of another kind.

    Raises:
        UserError: there is no target, or it is no wider than the source.
    """
    choice = settings.growth.options.get(OPTION)
    if choice is None or settings.growth.operator != "source":
        return 1.0
    if choice != "target":
        raise UserError(f"growth.{OPTION}: expected target, whose width it is read from, found {choice!r}")
    if settings.target is None:
        raise UserError("target: missing; the null control takes its width from it (target={hidden_size:96})")
    before = known_size(config, "hidden_size") or 0
    after = known_size(wanted_config(config, settings.target), "hidden_size") or 0
    if after <= before:
        raise UserError(
            f"growth={settings.growth.name}: the target's hidden_size={after} is not above the source's "
            f"{before}, so the null control would be the source itself; use growth=source",
        )
    return math.sqrt(after / before)


def scale_norms(network: PreTrainedModel, gain: float) -> None:
    """Multiply what every norm over the residual stream hands on, its shift left as it is.

    Raises:
        UserError: the network has no such norm.
    """
    width = known_size(network.config.to_dict(), "hidden_size")
    weights = [(module, _weight(module, width)) for module in network.modules()]
    norms = [(module, weight) for module, weight in weights if weight is not None]
    if not norms:
        raise UserError(f"{type(network).__name__}: it has no norm over its residual stream to scale")
    with torch.no_grad():
        for norm, weight in norms:
            offset = _offset(norm, weight)
            weight.copy_(gain * (weight + offset) - offset)


def _weight(module: nn.Module, width: int | None) -> nn.Parameter | None:
    """The weight of a module that scales each entry of the residual stream by one of it; else None."""
    weight = getattr(module, "weight", None)
    scales = isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,)
    return weight if scales else None


def _offset(norm: nn.Module, weight: nn.Parameter) -> float:
    """1 where a norm scales by 1 + its weight (Gemma), 0 where by its weight: measured, at zero."""
    inputs = torch.linspace(-1.0, 1.0, weight.numel(), dtype=weight.dtype)
    parameters = {name: torch.zeros_like(value) for name, value in norm.named_parameters()}
    handed_on = torch.func.functional_call(norm, parameters, (inputs,))
    return 1.0 if bool(handed_on.abs().max() > 0) else 0.0
