"""The clocks of a run and the losses of its open logging interval."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from outgrow.train.run.state import Position
from outgrow.train.start.stages import Span, flops_after


class Meter:
    """Counts steps, tokens, FLOPs and training seconds in `position`, and sums up losses until a logging interval closes."""

    def __init__(self, position: Position, processes: int, tokens_per_step: int, spans: Sequence[Span], peak: float | None) -> None:
        self.position, self.processes = position, processes
        self.tokens_per_step, self.spans, self.peak = tokens_per_step, spans, peak
        self.since = time.perf_counter()
        self.interval = (position.tokens, position.flops, position.seconds)

    def count(self, loss: float, norm: float, router: float | None = None) -> None:
        """One optimizer step is done: its mean loss, the gradient norm before clipping, and the routers' load-balancing term if any."""
        self.position.loss_sum += loss
        if router is not None:
            self.position.router_sum = router + (self.position.router_sum or 0.0)
        self.position.loss_count += 1
        self.position.grad_norm = norm
        self._advance()

    def skip(self) -> None:
        """One batch was passed over: its tokens were processed, and nothing was learned from them."""
        self.position.skipped += 1
        self._advance()

    def _advance(self) -> None:
        self.position.step += 1
        self.position.tokens = self.position.step * self.tokens_per_step
        self.position.flops = flops_after(self.spans, self.position.step, self.tokens_per_step)

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
        p = self.position
        return {"step": p.step, "tokens": p.tokens, "flops": p.flops, "seconds": round(p.seconds, 3)}

    def close_interval(self) -> dict[str, Any]:
        """Settle, and return the interval's mean loss, its last gradient norm and its speed over all processes; a new interval begins."""
        self.settle()
        p, (tokens, flops, seconds) = self.position, self.interval
        passed = max(p.seconds - seconds, 1e-9)
        speed = (p.tokens - tokens) / passed
        mfu = None if self.peak is None else (p.flops - flops) / passed / (self.peak * self.processes)
        loss = p.loss_sum / p.loss_count if p.loss_count else None  # None: every step of the interval was passed over
        balance = {} if p.router_sum is None or not p.loss_count else {"router_loss": p.router_sum / p.loss_count}
        row = {"loss": loss, **balance, "grad_norm": p.grad_norm, "tokens_per_second": round(speed, 1), "mfu": mfu}
        p.loss_sum, p.loss_count, p.router_sum, self.interval = 0.0, 0, None, (p.tokens, p.flops, p.seconds)
        return row
