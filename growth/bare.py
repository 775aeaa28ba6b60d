"""A model in memory without what was put around it, or the reason why its weights cannot be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from outgrow.model.base.errors import UserError
from outgrow.model.build import library_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bare(model: Any) -> PreTrainedModel:
    """The `transformers` model inside `torch.compile`, DDP or DataParallel.

    Raises:
        UserError: it is none, or none that is whole (sharded, reparametrised, quantised, without its head,
            with adapters).
    """
    while isinstance(inner := _inside(model), nn.Module):
        model = inner
    if reason := _obstacle(model):
        raise UserError(f"model {type(model).__name__}: {reason}")
    return model


def _inside(model: Any) -> Any:
    if isinstance(model, DistributedDataParallel | DataParallel):
        return model.module
    return getattr(model, "_orig_mod", None)  # of torch.compile


def _obstacle(model: Any) -> str | None:
    """Name the reason why the weights of a model cannot be read as those of a checkpoint, and the way out;
    None where they can.
    """
    from transformers import PreTrainedModel

    if hasattr(model, "merge_and_unload"):
        return "adapters lie beside its weights; give model.merge_and_unload()"
    if isinstance(model, nn.Module) and any(each.is_meta for each in model.parameters()):
        return (
            "some of its weights are not in memory (meta device: offloaded, or never loaded); load it whole, "
            "or grow the folder with growth.grow"
        )
    if isinstance(model, nn.Module) and _is_sharded(model):
        return (
            "its weights are sharded over processes; save it whole (a full state dict) and grow the folder "
            "with growth.grow"
        )
    if not isinstance(model, PreTrainedModel):
        return "expected a model of transformers; give one, or grow a folder with growth.grow"
    if getattr(model, "hf_quantizer", None) is not None:
        return "its weights are quantised; give model.dequantize()"
    names = [name for name, module in model.named_modules() if _is_computed(module)]
    if names:
        return (
            f"{names[0]}.weight is computed from other tensors (weight_norm, pruning or another "
            "parametrization); make it plain first with "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), or with the remove_… "
            "function of what was put on it"
        )
    classes = library_class(model.config)._model_mapping
    head_class = classes.get(type(model.config), None)
    if head_class is not None and not isinstance(model, head_class):
        return f"a language model with its head is grown; give the {head_class.__name__} that it is a part of"
    return None


def _is_computed(module: nn.Module) -> bool:
    """Check whether a weight is computed from other tensors: by a parametrization, or by hooks of the older
    kind, which keep the weight as a plain attribute (weight and spectral norm, pruning).
    """
    if parametrize.is_parametrized(module):
        return True
    stored = module._parameters.keys() | module._buffers.keys()
    return isinstance(getattr(module, "weight", None), torch.Tensor) and "weight" not in stored


def _is_sharded(model: nn.Module) -> bool:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
