"""What a config costs: parameters and training FLOPs, counted from the schema, or from the library's class where there is no schema."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import TYPE_CHECKING, Any

from .family import Config, Tensor, family_of, has_schema

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parameter_count(config: Config) -> int:
    """The number of parameters of the model that `config` describes; tied tensors count once."""
    if not has_schema(config):
        return sum(parameter.numel() for parameter in _class_of(config).parameters())
    return sum(prod(tensor.shape) for tensor in family_of(config).tensors(config) if not tensor.tied)


def matmul_parameter_count(config: Config) -> float:
    """Parameters that multiply an activation for every token: all matrices but the embedding look-ups (a tied head multiplies too).

    Without a schema, of a stack of experts (three axes, the experts first) only as many as a token is sent to.
    """
    if not has_schema(config):
        return _matmul_parameters_of_class(config)
    return sum(prod(tensor.shape) for tensor in family_of(config).tensors(config) if _multiplies(tensor))


def flops_per_token(config: Config, context: int) -> float:
    """Training FLOPs (forward and backward) per token at `context` tokens per sequence.

    Forward: 2 per matrix weight, and 2·heads·(qk + v) per attended position, of which causal attention has (context + 1) / 2 on average.
    Backward is twice the forward (Kaplan et al., 2001.08361; the attention term as in PaLM, 2204.02311, halved for the causal mask).
    Norms, activations, softmax and the optimizer are left out.
    """
    attention = 2 * _attention_width(config) * (context + 1) / 2
    return 3.0 * (2 * matmul_parameter_count(config) + attention)


def unpaid_flops_per_token(config: Config, context: int, frozen: Collection[str]) -> float:
    """What of `flops_per_token` is not computed where the tensors named in `frozen` (as stored, so without tied ones) learn nothing.

    A frozen matrix has no gradient of its own, 2 per weight; below the first layer in which anything learns, none is passed on either: 2
    more per weight, and all that the attention's backward pass costs. Nothing for a network without a schema, whose tensors have no order.
    """
    if not frozen or not has_schema(config):
        return 0.0
    tensors = list(family_of(config).tensors(config))
    layers = 1 + max(tensor.layer for tensor in tensors if tensor.layer is not None)
    places = _places(tensors, layers)
    still = [(tensor.line.tied_to if tensor.tied else tensor.name) in frozen for tensor in tensors]
    first = min((place for place, stays in zip(places, still, strict=True) if not stays), default=layers + 1)
    attention = 2 * _attention_width(config) / layers * (context + 1) / 2
    unpaid = 2.0 * attention * min(max(first, 0), layers)
    for tensor, place, stays in zip(tensors, places, still, strict=True):
        if _multiplies(tensor):
            unpaid += 2.0 * prod(tensor.shape) * (stays + (place < first))
    return unpaid


def _places(tensors: list[Tensor], layers: int) -> list[int]:
    """Where each tensor works: in a layer by its number, before the layers (-1) or behind them."""
    reached, places = -1, []
    for tensor in tensors:
        reached = layers if tensor.layer is None and reached >= 0 else reached if tensor.layer is None else tensor.layer
        places.append(reached)
    return places


def _multiplies(tensor: Tensor) -> bool:
    return tensor.line.kind == "linear" and not tensor.is_bias


def _attention_width(config: Config) -> int:
    """layers · heads · (qk + v)."""
    if has_schema(config):
        sizes = family_of(config).sizes(config)
        return sizes["layer"] * sizes["kv"] * sizes["group"] * (sizes["qk"] + sizes["v"])
    from .build import to_hf_config

    known = to_hf_config(config).get_text_config()  # under the library's standard names
    layers = getattr(known, "per_layer_config", None) or [known] * known.num_hidden_layers
    return sum(_layer_attention_width(layer) for layer in layers)


def _layer_attention_width(layer: Any) -> int:
    """heads · (qk + v) of one layer, by its config; 0 where it has no attention."""
    heads = getattr(layer, "num_attention_heads", None) or 0
    head = getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0)
    return 2 * heads * head


def _class_of(config: Config) -> PreTrainedModel:
    from .build import meta_model

    return meta_model(config)


def _matmul_parameters_of_class(config: Config) -> float:
    from torch import nn

    model = _class_of(config)
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    experts = config.get("num_experts_per_tok") or config.get("top_k") or 1
    total = 0.0
    for parameter in model.parameters():
        if parameter.ndim >= 2 and (id(parameter) not in looked_up or parameter is getattr(head, "weight", None)):
            total += parameter.numel() * (min(1.0, experts / parameter.shape[0]) if parameter.ndim == 3 else 1.0)
    return total
