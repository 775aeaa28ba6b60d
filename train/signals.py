"""Being asked to stop: SIGTERM (preemption, scancel), SIGUSR1 (sbatch --signal=USR1@120) and SIGUSR2 (submitit) make a run save and end.

The process then ends with status REQUEUE, which says: start the same command again, and it goes on where it stood.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

REQUEUE = 75  # sysexits.h calls it EX_TEMPFAIL: "invited to reattempt the operation later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """The run was asked to stop; it has saved a checkpoint, and the same command resumes from it."""


@contextmanager
def watched() -> Iterator[Callable[[], str | None]]:
    """While the block runs, SIGNALS are only noted: yields a function that names the first one that came, or None.

    Python lets only a process's main thread take signals; on another thread nothing is watched.
    """
    came: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in SIGNALS} if threading.current_thread() is threading.main_thread() else {}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true on any process; all of them have to ask, and all get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum").item() > 0
