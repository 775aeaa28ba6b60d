"""The clocks of a run and the losses of its open logging interval, read from the device only when someone asks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from model.errors import UserError
from train.state import Position


class Meter:
    """Counts steps, tokens, FLOPs and training seconds in `position`.

    Losses and gradient norms stay on the device until `settle`, so that a step costs no synchronisation; a non-finite one is found there,
    before anything is logged, evaluated or saved, and names the step that it came from.
    """

    def __init__(
        self, position: Position, accelerator: Accelerator, tokens_per_step: int, flops_per_token: float, peak: float | None
    ) -> None:
        self.position, self.accelerator = position, accelerator
        self.tokens_per_step, self.flops_per_token, self.peak = tokens_per_step, flops_per_token, peak
        self.pending: list[Tensor] = []
        self.grad_norm = math.nan
        self.since = time.perf_counter()
        self.interval = (position.tokens, position.seconds)

    def count(self, loss: Tensor, norm: Tensor) -> None:
        """One optimizer step is done: this process's mean loss, and the gradient norm before clipping."""
        self.position.step += 1
        self.position.tokens = self.position.step * self.tokens_per_step
        self.position.flops = self.position.tokens * self.flops_per_token
        self.pending.append(torch.stack((loss, norm)))

    def settle(self) -> None:
        """Read what is pending, averaged over the processes, and bring the clock up to now.

        Raises:
            UserError: a loss or gradient is not finite, naming its step.
        """
        if self.pending:
            rows = self.accelerator.reduce(torch.stack(self.pending), reduction="mean").tolist()
            self.pending.clear()
            for step, (loss, norm) in enumerate(rows, start=self.position.step - len(rows) + 1):
                _check_finite(step, loss, norm)
                self.position.loss_sum += loss
                self.position.loss_count += 1
                self.grad_norm = norm
        now = time.perf_counter()
        self.position.seconds += now - self.since
        self.since = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Settle, then keep the block (an evaluation, a checkpoint) off the training clock."""
        self.settle()
        yield
        self.since = time.perf_counter()

    def clocks(self) -> dict[str, Any]:
        p = self.position
        return {"step": p.step, "tokens": p.tokens, "flops": p.flops, "seconds": round(p.seconds, 3)}

    def close_interval(self) -> dict[str, Any]:
        """Settle, and return the interval's mean loss, its last gradient norm and its speed over all processes; a new interval begins."""
        self.settle()
        p, (tokens, seconds) = self.position, self.interval
        speed = (p.tokens - tokens) / max(p.seconds - seconds, 1e-9)
        mfu = None if self.peak is None else speed * self.flops_per_token / (self.peak * self.accelerator.num_processes)
        row = {"loss": p.loss_sum / p.loss_count, "grad_norm": self.grad_norm, "tokens_per_second": round(speed, 1), "mfu": mfu}
        p.loss_sum, p.loss_count, self.interval = 0.0, 0, (p.tokens, p.seconds)
        return row


def _check_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"step {step}: the loss is {loss} and the gradient norm {norm}; the run stops here and its checkpoints hold finite weights; "
            "lower optimizer.learning_rate or lengthen schedule.warmup_fraction (a new name= keeps this run beside the next)"
        )
