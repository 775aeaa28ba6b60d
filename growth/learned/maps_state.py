"""The state of maps that learn step by step, as a piece of what a growth keeps (`kept.py`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from outgrow.growth.learned.kept import Kept

PIECE = "maps"
SECONDS = 60.0  # between two states
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class MapsState:
    """The state of AdamW's parameters and what it has seen so far, as a piece."""

    kept: Kept
    _saved: float = field(default_factory=time.monotonic)

    def save(self, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
        """Keep the state after a step, one loss for each so far; seldom enough that it costs little."""
        if time.monotonic() - self._saved < SECONDS:
            return
        self.kept.put(PIECE, dict(self._arrays(optimizer)), losses)
        self._saved = time.monotonic()

    def _arrays(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, np.ndarray]]:
        """Name every value and its moments by the number of the parameter."""
        for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
            yield f"{number}.value", parameter.detach().numpy()
            for moment in MOMENTS:
                yield f"{number}.{moment}", optimizer.state[parameter][moment].numpy()

    def restore(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """Put the optimizer and its parameters where they were kept; the loss of every step so far."""
        piece = self.kept.get(PIECE)
        if piece is None:
            return []
        arrays, losses = piece
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
            with torch.no_grad():
                parameter.copy_(tensors[f"{number}.value"])
            moments = {moment: tensors[f"{number}.{moment}"] for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(len(losses))), **moments}
        return list(losses)
