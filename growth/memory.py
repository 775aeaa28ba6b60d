"""Growth of a model in memory: what `grow` does on disk, with the same bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from model.composite import flat
from model.config import Target
from model.family import has_schema

from .plan import Plan, plan
from .tensors import Tensors, expand

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def grow_model(
    model: PreTrainedModel,
    target: Target,
    operator: str = "lossless",
    *,
    depth: str | Sequence[int] = "identity",
    noise: float | None = None,
    seed: int = 0,
    dtype: Literal["float32"] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A larger model from a `transformers` model, on its device and, unless `dtype` says otherwise, in its dtype; it stays as it is.

    Arguments as `growth.plan` takes them. The bits are those that `grow` writes for the same seed, on any device.

    Raises:
        UserError: as `growth.plan`.
    """
    return follow(plan_of(model, target, operator, depth=depth, noise=noise, seed=seed, dtype=dtype, **options), model)


def plan_of(model: PreTrainedModel, target: Target, operator: str = "lossless", **how: Any) -> Plan:
    """The plan that `grow_model` follows, from the model's config and the dtypes of its tensors."""
    made = plan(config_of(model), target, operator, **how)
    return replace(made, dtypes=_tensors(model).dtypes)


def follow(plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
    """The model that `plan` makes of `model`."""
    import torch

    from model.build import empty_model, stored_names
    from model.stored import in_model

    backend = model.config._attn_implementation
    grown = empty_model(
        plan.target_config, dtype=model.dtype if plan.growth.dtype is None else torch.float32, device=model.device, attention=backend
    )
    with torch.no_grad():
        if has_schema(plan.target_config):
            parameters = {stored: grown.get_parameter(name) for name, stored in stored_names(grown).items()}
            for name, values in expand(plan, _tensors(model)):
                parameters[name].copy_(values)
        else:
            made = dict(expand(plan, _tensors(model)))
            whole, own = in_model(plan.target_config, made, made.__getitem__), grown.state_dict(keep_vars=True)
            for name in own:
                own[name].copy_(whole[name])
    return grown.train(model.training)


def _tensors(model: PreTrainedModel) -> Tensors:
    from model.stored import in_file

    return Tensors({name: tensor.detach() for name, tensor in in_file(config_of(model), _untied(model)).items()})


def _untied(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every tensor that a file of the model holds, under the model's own names."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return remove_tied_weights_from_state_dict(model.state_dict(keep_vars=True), model)


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """The model's config with everything in it, as its flat view."""
    named = {"dtype": str(model.dtype).removeprefix("torch.")}  # a config may still say what its weights were before they were cast
    return flat(json.loads(model.config.to_json_string(use_diff=False)) | named)
