"""The time that learning takes, told before it begins and while it goes on, on stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

SIDE = 1024  # of the matrices whose product tells how fast this machine is
EVERY = 60.0  # seconds between two lines
SHORT = 5.0  # seconds that need no word


@dataclass
class Telling:
    """A `learning` argument of `grow`: lines of text, an estimate first, then what is left, each minute.

    Attributes:
        left: seconds that are left, None before the first part is done.
    """

    left: float | None = None
    _began: float = 0.0
    _first: float = 0.0  # FLOPs that were done before
    _told: float = field(default_factory=time.monotonic)

    def __call__(self, done: float, flops: float) -> None:
        """Tell what is due after `done` of `flops` FLOPs."""
        now = time.monotonic()
        if not self._began:
            self._began = now
            self._first = done
            self._told = now
            self._estimate(flops - done)
        elif done > self._first:
            seconds = now - self._began
            self.left = seconds * (flops - done) / (done - self._first)
            if now - self._told >= EVERY:
                self._told = now
                share = done / flops
                self.say(f"learning: {share:.0%}, {human_time(self.left)} left")

    def _estimate(self, flops: float) -> None:
        """Tell the FLOPs and the time that this machine's matrix products alone would take for them."""
        speed = matrix_speed()
        seconds = flops / speed
        if seconds >= SHORT:
            self.say(
                f"learning: about {flops:.2g} FLOPs, {human_time(seconds)} or more at this machine's "
                f"{speed / 1e9:.0f} GFLOP/s; stopped, the same command goes on"
            )

    def say(self, line: str) -> None:
        """Write a line."""
        print(line, file=sys.stderr, flush=True)


def matrix_speed() -> float:
    """FLOPs per second of a product of two matrices in float32, the best of three."""
    import torch

    matrix = torch.ones(SIDE, SIDE)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        _ = matrix @ matrix
        best = min(best, time.perf_counter() - began)
    return 2.0 * SIDE**3 / best


def human_time(seconds: float) -> str:
    """Spell a duration in its largest unit: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
