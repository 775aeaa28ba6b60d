"""The load-balancing term of a mixture of experts: what its routers are trained on beside the text (Fedus et
al., 2101.03961, eq. 4).

Where a class of the library computes such a term, its own forward pass does it here too, with the coefficient
that the class reads from the config (`router_aux_loss_coef` in most; 0 switches it off). The term is no mean
over tokens: it is taken over the rows of one forward pass, and the passes of a step (gradient accumulation,
processes) weigh as many tokens as they have. So it moves a little with `train.micro_batch` and with the
number of processes, as in the library's own trainer; the loss on the text does not.

Shapes, as in train/loss.py: rows of context tokens; hidden, what the head reads; vocab, what it makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """Losses of a training forward pass that has more than the text's; all of one reduction over tokens.

    Attributes:
        objective: what is trained on.
        text: the plain loss on the text, as validation has it.
        router: the load-balancing term without its coefficient; None where there is none.
    """

    objective: Tensor
    text: Tensor
    router: Tensor | None = None

    @classmethod
    def of(cls, output: Any) -> Losses:
        """The losses that a forward pass returned together, or the text's loss, which it returned alone."""
        return cls(*output) if isinstance(output, tuple) else cls(output, output)


@dataclass(frozen=True)
class Balance:
    """The load-balancing term of one forward pass: as the objective has it, and without its coefficient."""

    weighted: Tensor
    plain: Tensor


def has_routers(network: Any) -> bool:
    """Check whether a network has routers whose logits its class's forward pass can return for a loss."""
    return (
        "output_router_logits" in inspect.signature(network.forward).parameters
        and _recorded(network) is not False
    )


def unbalanced(network: Any) -> str | None:
    """A line for the reader where a network has routers and its class no load-balancing term for them."""
    if _recorded(network) and not has_routers(network):
        return (
            f"the library's {type(network).__name__} has no load-balancing term for its routers: the text "
            "alone is trained on"
        )
    return None


def _recorded(network: Any) -> bool | None:
    """Check whether the library records some modules' outputs as routers' logits; None if the class is
    silent.
    """
    routers = router_class(network)
    if routers is None:
        return None
    return any(isinstance(module, routers) for module in network.modules())


def router_class(network: Any) -> type | None:
    """The class of modules whose outputs the library records as routers' logits; None if the network's is
    silent."""
    recorded = (getattr(network.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    routers = getattr(recorded, "target_class", recorded)
    return routers if isinstance(routers, type) else None


def balanced_forward(
    network: Any,
    inputs: Mapping[str, Any],
    *,
    logits: bool,
) -> tuple[Tensor, Balance | None]:
    """One forward pass with the class's own load-balancing term.

    The class adds coefficient · term to the loss of labels that it is given. That loss is replaced by zero,
    so what it returns is the weighted term.

    Args:
        network: a causal language model with `has_routers`.
        inputs: what its forward pass takes.
        logits: return the logits, else what the head reads; the head then goes over one position alone.

    Returns:
        (rows, context, vocab) or (rows, context, hidden), and the term; None where the class makes none (of
        dense layers alone).
    """
    read: list[Any] = []
    base = network.base_model
    hooks = [base.register_forward_hook(lambda module, arguments, output: read.append(output))]
    options = dict(inputs)
    # The term takes padding from a mask of (rows, context), and there is none: masks of documents go past it.
    if (masks := options.pop("attention_mask", None)) is not None:
        masked = {"attention_mask": masks}
        hook = base.register_forward_pre_hook(
            lambda module, arguments, named: (arguments, {**named, **masked}),
            with_kwargs=True,
        )
        hooks.append(hook)
    try:
        with _no_loss_on_labels(network):
            out = network(
                **options,
                labels=inputs["input_ids"],
                logits_to_keep=0 if logits else 1,
                output_router_logits=True,
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
    balance = None if out.aux_loss is None else Balance(out.loss, out.aux_loss)
    output = out.logits if logits else read[-1].last_hidden_state
    return output, balance


@contextmanager
def _no_loss_on_labels(network: Any) -> Iterator[None]:
    """Replace the class's loss on labels by zero in the block."""
    before = network.loss_function
    network.loss_function = lambda logits, *_, **__: logits.new_zeros(())
    try:
        yield
    finally:
        network.loss_function = before
