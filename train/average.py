"""The average of a run's weights over its steps (exponential moving average, EMA; train.ema), evaluated,
saved and grown beside the weights themselves.

    average ← decay · average + (1 - decay) · weights      after every optimizer step

It begins as the weights that the run starts with, and changes nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from outgrow.train.machine.distribute import local, shared_as


class Average:
    """The averaged weights of a network; where that is sharded, this process's parts of them.

    Args:
        model: as prepared for training.
        weights: its parameters, by the network's own names.
        decay: of the average at each step.

    Attributes:
        tensors: the average, in float32, by the same names; a checkpoint holds them.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self.sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.weights = weights
        self.tensors = {name: weight.detach().clone() for name, weight in weights.items()}
        self.move = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after one more step into the average."""
        averages = map(local, self.tensors.values())
        weights = map(local, self.weights.values())
        self.move([*averages], [*weights], None)

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Begin as these whole weights, the same on every process."""
        for name, average in self.tensors.items():
            part = shared_as(average, weights[name])
            local(average).copy_(local(part))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network have the averaged weights in the block, and its own again after it, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.tensors.items():
            weight = local(self.weights[name])
            part = local(average)
            own = weight.clone()
            weight.copy_(part)
            part.copy_(own)
        for module in self.sharded:
            module.reshard()  # what FSDP has gathered already are the weights before
