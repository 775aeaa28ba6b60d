"""Cost of a config: parameters and training FLOPs, counted from the schema, or from the library's class where
there is no schema.

FLOPs have two sources. A formula over a family's schema, which PyTorch's counter confirms; and the counter
itself (`model.flops`), for classes without a schema and for windowed attention. Where a class cannot be
traced without weights, a formula over its parameters is left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError
from outgrow.model.family import Config, Tensor, family_of, has_schema
from outgrow.model.flops import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
)


def parameter_count(config: Config) -> int:
    """The number of parameters of the model that `config` describes; tied tensors count once."""
    if not has_schema(config):
        parameters = _class_of(config).parameters()
        return sum(parameter.numel() for parameter in parameters)
    tensors = family_of(config).tensors(config)
    stored = [tensor for tensor in tensors if not tensor.tied]
    return sum(prod(tensor.shape) for tensor in stored)


def active_parameter_count(config: Config) -> int:
    """Count the parameters that one token meets: of a stack of experts only as many as it is sent to; all of
    them in a dense network.

    Shared experts, which every token goes through, are no part of a stack.
    """
    total = parameter_count(config)
    if has_schema(config) or not _expert_counts(config):
        return total
    chosen = experts_per_token(config)
    idle = 0.0
    for parameter in _class_of(config).parameters():
        experts = parameter.shape[0] if parameter.ndim else 0
        if _is_stack(parameter, config) and chosen < experts:
            idle_share = 1 - chosen / experts
            idle += parameter.numel() * idle_share
    return total - round(idle)


def _whole_numbers(config: Config, word: str) -> list[int]:
    """The whole numbers under keys that have a word in them."""
    values = [value for key, value in config.items() if word in str(key)]
    return [value for value in values if type(value) is int]


def matmul_parameter_count(config: Config) -> float:
    """Parameters that multiply an activation for every token: all matrices but the embedding look-ups (a tied
    head multiplies too).

    Without a schema, of a stack of experts (three axes, the experts first) only as many as a token is sent
    to.
    """
    if not has_schema(config):
        return _matmul_parameters_of_class(config)
    tensors = filter(_multiplies, family_of(config).tensors(config))
    return sum(prod(tensor.shape) for tensor in tensors)


def flops_per_token(config: Config, context: int) -> float:
    """Training FLOPs (forward and backward) per token at `context` tokens per sequence.

    Forward: 2 per matrix weight, and 2·heads·(qk + v) per attended position, of which causal attention has
    (context + 1) / 2 on average and a sliding window at most its width. Backward is twice the forward (Kaplan
    et al., 2001.08361; the attention term as in PaLM, 2204.02311, halved for the causal mask). Norms,
    activations, softmax and the optimizer are left out.
    """
    count = None
    if not _by_schema(config, context):
        count = counted(config, context)
    if count is not None:
        return 3.0 * count.total
    of_matrices = 2 * matmul_parameter_count(config)
    return 3.0 * (of_matrices + _attention(config, context))


def flops_source(config: Config, context: int) -> str:
    """Name the source of `flops_per_token`."""
    if _by_schema(config, context):
        return "formula over the family's schema"
    if counted(config, context) is not None:
        return "PyTorch's counter, over the class's forward pass"
    return (
        "formula over the class's parameters: the class does not run without weights, so nothing was counted"
    )


def _by_schema(config: Config, context: int) -> bool:
    if not has_schema(config):
        return False
    windows = _whole_numbers(config, "window")
    return all(window >= context for window in windows)


def _attention(config: Config, context: int) -> float:
    """Forward FLOPs per token of the scores and the weighted values."""
    count = None
    if not _by_schema(config, context):
        count = counted(config, context)
    if count is not None:
        return count.attention
    return _attention_width(config) * (context + 1)


def unpaid_flops_per_token(config: Config, context: int, frozen: Collection[str]) -> float:
    """Count what of `flops_per_token` is not computed where the tensors named in `frozen` (as stored, so
    without tied ones) learn nothing.

    A frozen matrix has no gradient of its own, 2 per weight; below the first layer in which anything learns,
    none is passed on either: 2 more per weight, and all that the attention's backward pass costs. Nothing for
    a network without a schema, whose tensors have no order.
    """
    if not frozen or not has_schema(config):
        return 0.0
    tensors = list(family_of(config).tensors(config))
    numbers = [tensor.layer for tensor in tensors if tensor.layer is not None]
    layers = 1 + max(numbers)
    depths = _depths(tensors, layers)
    names = [tensor.line.tied_to if tensor.tied else tensor.name for tensor in tensors]
    still = [name in frozen for name in names]
    learning = [depth for depth, stays in zip(depths, still, strict=True) if not stays]
    first = min(learning, default=layers + 1)
    below = min(max(first, 0), layers)  # layers in which nothing learns, nor before them
    of_attention = _attention(config, context)
    unpaid = 2.0 * of_attention / layers * below
    rows = zip(tensors, depths, still, strict=True)
    for tensor, depth, stays in rows:
        if _multiplies(tensor):
            products = stays + (depth < first)  # for its own gradient, for the one passed on
            unpaid += 2.0 * prod(tensor.shape) * products
    return unpaid


def _depths(tensors: list[Tensor], layers: int) -> list[int]:
    """Number each tensor by its layer; -1 before the layers, `layers` behind them."""
    depth, depths = -1, []
    for tensor in tensors:
        if tensor.layer is not None:
            depth = tensor.layer
        elif depth >= 0:
            depth = layers
        depths.append(depth)
    return depths


def _multiplies(tensor: Tensor) -> bool:
    return tensor.line.kind == "linear" and not tensor.is_bias


def _attention_width(config: Config) -> int:
    """layers · heads · (qk + v)."""
    if has_schema(config):
        sizes = family_of(config).sizes(config)
        heads = sizes["kv"] * sizes["group"]
        widths = sizes["qk"] + sizes["v"]
        return sizes["layer"] * heads * widths
    from outgrow.model.build import to_hf_config

    standard_config = to_hf_config(config).get_text_config()  # under the library's standard names
    each = getattr(standard_config, "per_layer_config", None)
    layers = each or [standard_config] * standard_config.num_hidden_layers
    return sum(_layer_attention_width(layer) for layer in layers)


def _layer_attention_width(layer: Any) -> int:
    """heads · (qk + v) of one layer, by its config; 0 where it has no attention."""
    heads = getattr(layer, "num_attention_heads", None) or 0
    if not heads:
        return 0
    head = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return 2 * heads * head


def _class_of(config: Config) -> PreTrainedModel:
    from outgrow.model.build import meta_model

    return meta_model(config)


def _matmul_parameters_of_class(config: Config) -> float:
    from torch import nn

    from outgrow.model.twin import layerless

    model = _class_of(config)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = {id(module.weight) for module in embeddings}
    head = getattr(model.get_output_embeddings(), "weight", None)
    chosen = experts_per_token(config)
    mixes = bool(_expert_counts(config))  # else three axes are a projection to heads
    unused = _unused(config)
    total = 0.0
    for name, parameter in model.named_parameters():
        is_matrix = id(parameter) not in looked_up or parameter is head
        if parameter.ndim < 2 or not is_matrix or layerless(name) in unused:
            continue
        share = 1.0
        if (
            mixes and parameter.ndim == 3 and parameter.shape[1] > 1
        ):  # also where some experts compute nothing
            share = min(1.0, chosen / parameter.shape[0])
        total += parameter.numel() * share
    return total


def _is_stack(parameter: Any, config: Config) -> bool:
    """Check for the matrices of as many experts as a config says."""
    several = parameter.ndim == 3 and parameter.shape[1] > 1  # a depthwise kernel has 1 row
    return several and parameter.shape[0] in _expert_counts(config)


def _expert_counts(config: Config) -> set[int]:
    """The numbers of experts that a config, or a part of it, speaks of."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    counts: set[int] = set()
    for part in parts:
        counts.update(_whole_numbers(part, "expert"))
    return counts


def _unused(config: Config) -> set[str]:
    """The parameters, without their layers' numbers, that text does not reach, as a tiny twin tells; none for
    a class without a twin.
    """
    from outgrow.model.matrices import parameters_of

    try:
        kinds = parameters_of(config)
    except UserError:
        return set()
    return {name for name, parameter in kinds.items() if parameter.kind == "unused"}


def experts_per_token(config: Config) -> int:
    """Experts for each token as the config says, also in a part of it (DBRX); 1 where it says nothing."""
    parts = [part for part in config.values() if isinstance(part, Mapping)]
    for part in (config, *parts):
        for key in EXPERTS_PER_TOKEN:
            if part.get(key):
                return int(part[key])
    return 1
