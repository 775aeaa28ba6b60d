"""Growth of a model in memory: what `grow` does on disk, with the same bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from outgrow.growth.arguments import check_arguments
from outgrow.growth.bare import bare
from outgrow.growth.decision import Decision
from outgrow.growth.engine.finite import FiniteReader
from outgrow.growth.engine.tensors import Tensors, expand
from outgrow.growth.plan import Plan, check_tensors
from outgrow.growth.planning import plan
from outgrow.model.base.errors import UserError, names_of
from outgrow.model.build import meta_model
from outgrow.model.composite import flat
from outgrow.model.config import Target
from outgrow.model.family import has_schema
from outgrow.model.headers import Stored
from outgrow.model.twin import layerless

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from outgrow.growth.engine.rows import Reader


def grow_model(
    model: PreTrainedModel,
    target: Target,
    operator: str = "lossless",
    *,
    depth: str | Sequence[int] = "identity",
    noise: float | None = None,
    seed: int = 0,
    dtype: Literal["float32"] | None = None,
    nonfinite: Literal["refuse", "allow"] = "refuse",
    **options: Any,
) -> PreTrainedModel:
    """A larger model from a `transformers` model, on its device and, unless `dtype` says otherwise, in its
    dtype; it stays as it is.

    Arguments as `growth.plan` takes them, `nonfinite` as `grow`. The bits are those that `grow` writes for
    the same seed, on any device; each tensor keeps its dtype. What `torch.compile`, DDP or DataParallel have
    put around a model is taken off.

    Raises:
        UserError: as `growth.plan`; the model's weights are not whole and plain, are not its config's, or are
            not finite.
    """
    check_arguments(nonfinite=nonfinite)
    model = bare(model)
    grown_plan = plan_of(model, target, operator, depth=depth, noise=noise, seed=seed, dtype=dtype, **options)
    return follow(grown_plan, model, nonfinite=nonfinite)


def plan_of(model: PreTrainedModel, target: Target, operator: str = "lossless", **how: Any) -> Plan:
    """The plan that `grow_model` follows, from the model's config and the dtypes of its tensors."""
    grown_plan = plan(config_of(model), target, operator, **how)
    if grown_plan.lesson is not None:
        raise UserError(f"operator {operator!r}: learns in a folder; save the model and use growth.grow")
    tensors = _Held(_tensors(model))
    checked: Decision = grown_plan
    if grown_plan.change is not None:
        checked = grown_plan.change.within
    dtypes = check_tensors(tensors, checked.growth, checked.steps)
    return replace(grown_plan, dtypes=dtypes)


@dataclass(frozen=True)
class _Held:
    """A model's tensors, to be checked as those of a folder are."""

    reader: Tensors
    folder: str = "the model in memory"

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        return self.reader.stored()


def follow(
    plan: Plan, model: PreTrainedModel, nonfinite: Literal["refuse", "allow"] = "refuse"
) -> PreTrainedModel:
    """The model that `plan` makes of `model`.

    Raises:
        UserError: a weight is not finite, which `nonfinite` refuses.
    """
    import torch

    from outgrow.model.build import empty_model, stored_names
    from outgrow.model.conversion import in_model

    backend = model.config._attn_implementation
    dtype = model.dtype if plan.growth.dtype is None else torch.float32
    grown = empty_model(plan.target_config, dtype=dtype, device=model.device, attention=backend)
    tensors = _tensors(model)
    reader: Reader = tensors
    if nonfinite != "allow":
        reader = FiniteReader(tensors, tensors.dtypes)
    with torch.no_grad():
        if has_schema(plan.target_config):
            names = stored_names(grown)
            parameters = {stored: grown.get_parameter(name) for name, stored in names.items()}
            for name, values in expand(plan, reader):
                parameters[name].data = values.to(model.device)
        else:
            expanded = dict(expand(plan, reader))
            values_of = in_model(plan.target_config, expanded, expanded.__getitem__)
            own = grown.state_dict(keep_vars=True)
            kinds: dict[str, torch.dtype] = {}
            if not plan.growth.dtype:
                state = _state(model)
                kinds = {layerless(name): tensor.dtype for name, tensor in state.items()}
            for name, parameter in own.items():
                kind = kinds.get(layerless(name), parameter.dtype)
                parameter.data = values_of[name].to(model.device, kind)
    return grown.train(model.training)


def _tensors(model: PreTrainedModel) -> Tensors:
    from outgrow.model.conversion import in_file

    state = _untied(model)
    blank = meta_model(config_of(model))
    for name, other in blank.all_tied_weights_keys.items():
        both = name in state and other in state
        if both and not state[name].equal(state[other]):
            raise UserError(
                f"the model in memory: its config ties {name} to {other}, and they differ; set "
                "tie_word_embeddings to False"
            )
    names = blank.state_dict().keys()
    if strange := [name for name in state if name not in names]:
        raise UserError(
            f"the model in memory: unknown {names_of(strange)}, which a {type(model).__name__} of its "
            "config does not have"
        )
    stored = in_file(config_of(model), state)
    return Tensors({name: tensor.detach() for name, tensor in stored.items()})


def _untied(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every tensor that a file of the model holds, under the model's own names."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return remove_tied_weights_from_state_dict(_state(model), model)


def _state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors by its own names, also where some of its layers are compiled."""
    state = model.state_dict(keep_vars=True)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """The model's config with everything in it, as its flat view."""
    # a config may still say what its weights were before they were cast
    named = {"dtype": str(model.dtype).removeprefix("torch.")}
    config = json.loads(model.config.to_json_string(use_diff=False))
    return flat(config | named)
