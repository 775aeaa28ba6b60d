"""The clocks of a run and the losses of its open logging interval."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from outgrow.train.run.record import Span, flops_after
from outgrow.train.run.state import Position


class Meter:
    """Counts steps, tokens, FLOPs and training seconds in `position`, and sums up losses until a logging
    interval closes.
    """

    def __init__(
        self,
        position: Position,
        processes: int,
        tokens_per_step: int,
        spans: Sequence[Span],
        peak: float | None,
    ) -> None:
        self.position = position
        self.processes = processes
        self.tokens_per_step = tokens_per_step
        self.spans = spans
        self.peak = peak
        self.since = time.perf_counter()
        self.interval = (position.tokens, position.flops, position.seconds)

    def count(self, loss: float, norm: float, router: float | None = None) -> None:
        """Count an optimizer step.

        Args:
            loss: its mean loss.
            norm: the gradient's, before clipping.
            router: the routers' load-balancing term, if any.
        """
        self.position.loss_sum += loss
        if router is not None:
            self.position.router_sum = router + (self.position.router_sum or 0.0)
        self.position.loss_count += 1
        self.position.grad_norm = norm
        self._advance()

    def skip(self) -> None:
        """Count a batch that was skipped: its tokens were processed, and nothing was learned from them."""
        self.position.skipped += 1
        self._advance()

    def _advance(self) -> None:
        self.position.step += 1
        self.position.tokens = self.position.step * self.tokens_per_step
        step = self.position.step
        self.position.flops = flops_after(self.spans, step, self.tokens_per_step)

    def settle(self) -> None:
        """Bring the clock up to now."""
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
        """The clocks, as every row of the metrics has them."""
        position = self.position
        seconds = round(position.seconds, 3)
        return {"step": position.step, "tokens": position.tokens, "flops": position.flops, "seconds": seconds}

    def close_interval(self) -> dict[str, Any]:
        """Return the interval's mean loss, last gradient norm and throughput over all processes, and begin a
        new one.

        MFU is model-FLOPs utilisation: counted FLOPs over the devices' peak.
        """
        self.settle()
        position, (tokens, flops, seconds) = self.position, self.interval
        passed = max(position.seconds - seconds, 1e-9)

        row: dict[str, Any] = {"loss": None}  # None: every step of the interval was skipped
        if position.loss_count:
            row["loss"] = position.loss_sum / position.loss_count
            if position.router_sum is not None:
                row["router_loss"] = position.router_sum / position.loss_count
        row["grad_norm"] = position.grad_norm
        speed = (position.tokens - tokens) / passed
        row["tokens_per_second"] = round(speed, 1)
        row["mfu"] = None
        if self.peak is not None:
            achieved = (position.flops - flops) / passed
            row["mfu"] = achieved / (self.peak * self.processes)

        position.loss_sum = 0.0
        position.loss_count = 0
        position.router_sum = None
        self.interval = (position.tokens, position.flops, position.seconds)
        return row
