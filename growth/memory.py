"""Growth of a model in memory: what `grow` does on disk, with the same bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from model.config import Target

from .plan import Plan, plan
from .tensors import Tensors, expand

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def grow_model(
    model: PreTrainedModel,
    target: Target,
    operator: str = "lossless",
    *,
    depth: str | Sequence[int] = "identity",
    noise: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """A larger model from a `transformers` model, on the model's device and in its dtype; the model itself stays as it is.

    Arguments as `growth.plan` takes them. The bits are those that `grow` writes for the same seed, on any device.

    Raises:
        UserError: as `growth.plan`.
    """
    return follow(plan_of(model, target, operator, depth=depth, noise=noise, seed=seed, **options), model)


def plan_of(model: PreTrainedModel, target: Target, operator: str = "lossless", **how: Any) -> Plan:
    """The plan that `grow_model` follows, from the model's config and the dtypes of its tensors."""
    made = plan(json.loads(model.config.to_json_string(use_diff=False)), target, operator, **how)
    return replace(made, dtypes=_tensors(model).dtypes)


def follow(plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
    """The model that `plan` makes of `model`."""
    import torch

    from model.build import empty_model, stored_names

    backend = model.config._attn_implementation
    grown = empty_model(plan.target_config, dtype=model.dtype, device=model.device, attention=backend)
    parameters = {stored: grown.get_parameter(name) for name, stored in stored_names(grown).items()}
    with torch.no_grad():
        for name, values in expand(plan, _tensors(model)):
            parameters[name].copy_(values)
    return grown.train(model.training)


def _tensors(model: PreTrainedModel) -> Tensors:
    from model.build import stored_names

    return Tensors({stored: model.get_parameter(name) for name, stored in stored_names(model).items()})
