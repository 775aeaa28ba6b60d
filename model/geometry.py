"""What a config costs: parameters, bytes and training FLOPs, counted from the schema without building anything."""

from __future__ import annotations

from math import prod

from .family import Config, family_of


def parameter_count(config: Config) -> int:
    """The number of parameters of the model that `config` describes; tied tensors count once."""
    return sum(prod(tensor.shape) for tensor in family_of(config).tensors(config) if not tensor.tied)


def matmul_parameter_count(config: Config) -> int:
    """Parameters that multiply an activation for every token: all matrices but the embedding look-ups (a tied head multiplies too)."""
    tensors = family_of(config).tensors(config)
    return sum(prod(tensor.shape) for tensor in tensors if tensor.line.kind == "linear" and not tensor.is_bias)


def flops_per_token(config: Config, context: int) -> float:
    """Training FLOPs (forward and backward) per token at `context` tokens per sequence.

    Forward: 2 per matrix weight, and 2·heads·(qk + v) per attended position, of which causal attention has (context + 1) / 2 on average.
    Backward is twice the forward (Kaplan et al., 2001.08361; the attention term as in PaLM, 2204.02311, halved for the causal mask).
    Norms, activations, softmax and the optimizer are left out.
    """
    sizes = family_of(config).sizes(config)
    attention = 2 * sizes["layer"] * sizes["kv"] * sizes["group"] * (sizes["qk"] + sizes["v"]) * (context + 1) / 2
    return 3.0 * (2 * matmul_parameter_count(config) + attention)
