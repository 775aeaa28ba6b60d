"""The state of maps that learn step by step, beside the unfinished folder: a killed growth goes on from it.

`<out>.learning.safetensors` is replaced whole, and removed when the folder is complete. It is used only where
everything that decides the result is the same, so that a growth that was stopped ends with the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import whole_file

SECONDS = 60.0  # between two states
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Kept:
    """The state of AdamW's parameters and what it has seen so far.

    Attributes:
        key: a fingerprint of everything that decides the result.
    """

    file: Path
    key: str
    _saved: float = field(default_factory=time.monotonic)

    def save(self, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
        """Keep the state after a step, one loss for each so far; seldom enough that it costs little."""
        if time.monotonic() - self._saved < SECONDS:
            return
        told = {"growth": self.key, "losses": json.dumps(losses)}
        with whole_file(self.file) as partial:
            save_file(dict(self._tensors(optimizer)), partial, told)
        self._saved = time.monotonic()

    def _tensors(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
        """Name every value and its moments by the number of the parameter."""
        for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
            yield f"{number}.value", parameter.detach()
            for moment in MOMENTS:
                yield f"{number}.{moment}", optimizer.state[parameter][moment]

    def restore(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """Put the optimizer and its parameters where they were kept; the loss of every step so far.

        Raises:
            UserError: another file is in the way.
        """
        if not self.file.exists():
            return []
        try:
            with safe_open(self.file, "pt") as opened:
                told = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            told, tensors = {}, {}
        if "growth" not in told:
            raise UserError(
                f"out: {self.file} is in the way and holds no state of a growth; move it, or choose another "
                "folder"
            )
        if told["growth"] != self.key:
            return []
        losses: list[float] = json.loads(told["losses"])
        for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
            with torch.no_grad():
                parameter.copy_(tensors[f"{number}.value"])
            moments = {moment: tensors[f"{number}.{moment}"] for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(len(losses))), **moments}
        return losses
