"""Validation loss over fixed windows: the same text for every arm, step and world size.

Shapes, as in train/loss.py: a batch is (rows, context + 1) token ids, of which (rows context) are predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from outgrow.train.run.record import Evaluation


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[np.ndarray],
    accelerator: Accelerator,
    bytes_per_token: float,
) -> Evaluation:
    """The mean loss of a `NextTokenLoss` over all predicted tokens of `batches`, which processes take in
    turn.

    Bits per byte are nats per token / ln 2 / bytes per token, so that tokenizers can be compared. Perplexity
    is exp of the loss in nats.

    Args:
        batches: windows of token ids, (rows, context + 1) each.
    """
    model.eval()
    count = len(batches)
    total = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    for first in range(0, count, accelerator.num_processes):
        # Where no batch is left, the last one counts nothing: sharded processes must run the layers together.
        number = first + accelerator.process_index
        weight = float(number < count)
        windows = batches[min(number, count - 1)]
        ids = torch.from_numpy(windows).to(accelerator.device)
        loss = model(ids, reduction="sum")
        predicted = windows[:, 1:].size
        counted = torch.tensor([loss.item(), predicted], dtype=torch.float64)
        total += weight * counted
    model.train()
    everywhere = accelerator.reduce(total.to(accelerator.device), reduction="sum")
    nats, tokens = everywhere.tolist()
    val_loss = nats / tokens
    return Evaluation(val_loss, val_loss / math.log(2) / bytes_per_token)
