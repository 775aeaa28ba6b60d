"""A model's own tensors and those of its file: renamed, and in some families split, joined or transposed, as
the library does on saving.

What goes through here need not be weights: gradients and an optimizer's moments take the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError
from outgrow.model.base.quiet import quietly
from outgrow.model.build import library_class, meta_model, stored_names, to_hf_config
from outgrow.model.family import Config, has_schema

if TYPE_CHECKING:
    import torch


def in_file(config: Config, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names of a model's parameters, as a checkpoint of `config` would hold them.

    Of a family with a schema they are the same tensors; of others the library may make new ones.
    """
    model = meta_model(config)
    if has_schema(config):
        stored = stored_names(model).items()
        return {name: tensors[own] for own, name in stored if own in tensors}
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))


def in_model(
    config: Config, names: Iterable[str], tensor: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The way back: a tensor under every name of a model's parameters.

    Args:
        names: of the tensors in the file.
        tensor: gives the tensor of such a name.

    Raises:
        UserError: the library makes other parameters of them.
    """
    if has_schema(config):
        stored = stored_names(meta_model(config))
        return {own: tensor(name) for own, name in stored.items()}
    hf_config = to_hf_config(config)
    state = {name: tensor(name) for name in names}
    # loses none
    dtypes = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    dtype = max(dtypes, key=lambda kind: kind.itemsize)
    classes: Any = library_class(hf_config)._model_mapping
    library = classes[type(hf_config)]
    with quietly():
        model, report = library.from_pretrained(
            None, config=hf_config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    faults = {name: reported for name, reported in report.items() if reported}
    if faults:
        raise UserError(
            f"family {config['model_type']!r}: the library does not make a model of its own tensors "
            f"({str(faults)[:300]})"
        )
    return model.state_dict()
