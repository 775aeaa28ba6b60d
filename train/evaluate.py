"""Validation loss over fixed windows: the same text for every arm, step and world size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation measured."""

    val_loss: float  # nats per token
    bits_per_byte: float


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[np.ndarray], accelerator: Accelerator, bytes_per_token: float) -> Evaluation:
    """The mean loss of a `NextTokenLoss` over every predicted token of `batches`, each (rows, context + 1), shared out by turns.

    Bits per byte are nats per token / ln 2 / bytes per token, so that tokenizers can be compared.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    for first in range(0, len(batches), accelerator.num_processes):
        # Where no batch is left, the last one counts nothing: sharded processes have to go through the layers together.
        own = first + accelerator.process_index
        windows, weight = batches[min(own, len(batches) - 1)], float(own < len(batches))
        loss = model(torch.from_numpy(windows).to(accelerator.device), reduction="sum")
        total += weight * torch.tensor([loss.item(), windows[:, 1:].size], dtype=torch.float64)
    model.train()
    nats, tokens = accelerator.reduce(total.to(accelerator.device), reduction="sum").tolist()
    return Evaluation(nats / tokens, nats / tokens / math.log(2) / bytes_per_token)
