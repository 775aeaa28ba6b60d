"""Balance of a mixture's experts (MoE): how evenly the tokens of a step go to them, which the routers'
load-balancing term is to bring about, measured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from outgrow.model.geometry import experts_per_token
from outgrow.train.router import router_class


class ExpertLoad:
    """Counts the tokens that every expert of a network gets, layer by layer, while it trains.

    Attributes:
        counts: router's name → (experts,) how many tokens each expert got since `clear`. What is computed
        twice for the backward pass
            (activation checkpointing) counts twice, of every expert alike.
    """

    def __init__(self, network: Any) -> None:
        self.counts: dict[str, Tensor] = {}
        kind = router_class(network)
        self.chosen = experts_per_token(network.config.to_dict())
        for name, module in network.named_modules():
            if kind is not None and issubclass(type(module), kind):
                module.register_forward_hook(partial(self._count, name))

    def _count(self, name: str, router: nn.Module, inputs: Any, out: Any) -> None:
        if not router.training:
            return
        parts = out if isinstance(out, tuple) else (out,)
        with torch.no_grad():
            logits = parts[0].detach()
            tensors = [part for part in parts[1:] if isinstance(part, Tensor)]
            integers = [tensor for tensor in tensors if not tensor.is_floating_point()]
            indices = integers[0] if integers else logits.topk(self.chosen, dim=-1).indices
            experts = logits.shape[-1]
            counts = torch.zeros(experts, device=logits.device)
            ones = torch.ones(indices.numel(), device=logits.device)
            counts.index_add_(0, indices.flatten(), ones)
            self.counts[name] = counts + self.counts.get(name, 0)

    def clear(self) -> None:
        """Forget what was counted."""
        self.counts = {}

    def row(self, accelerator: Any) -> dict[str, float]:
        """The largest and the smallest load of an expert in any layer, where 1 is an even share, and how many
        experts had no token.

        Of all processes, which all have to ask; nothing where there are no routers.
        """
        if not self.counts:
            return {}
        counts = accelerator.reduce(
            torch.stack([self.counts[name] for name in sorted(self.counts)]), reduction="sum"
        )
        load = counts / counts.mean(dim=1, keepdim=True)
        return {
            "expert_load_max": round(float(load.max()), 4),
            "expert_load_min": round(float(load.min()), 4),
            "experts_idle": int((counts == 0).sum()),
        }
