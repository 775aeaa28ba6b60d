"""Stopping on request, as a preempted job has to: a signal makes a run save and end.

SIGTERM (preemption, scancel), SIGUSR1 (sbatch --signal=USR1@120), SIGUSR2 (submitit) and Ctrl-C (SIGINT) do
so.

The process then ends with status REQUEUE, which says: start the same command again, and it goes on where it
stood. After Ctrl-C the status is a shell's own, 130, so that nothing starts again what a person has stopped;
a second Ctrl-C does not wait for the saving.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

REQUEUE = 75  # sysexits.h calls it EX_TEMPFAIL: "invited to reattempt the operation later"
INTERRUPTED = 128 + signal.SIGINT
LAUNCHED = "TORCHELASTIC_RUN_ID"  # the variable that torchrun gives its processes
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def overruled(status: int) -> str:
    """Say what torchrun (or Accelerate's launcher) makes of this process's status; "" where neither runs.

    It takes SIGTERM itself, hands it on, and ends by an exception of its own whatever its processes end with;
    nothing that they do changes that. `train.launch` leaves SIGTERM to its processes, as it tells them in the
    variable that torchrun hands on.
    """
    if signal.SIGTERM.name not in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "").split(","):
        return ""
    return (
        f"; torchrun, which started this process, ends with status 1 instead of {status}, and kills what "
        "has not saved 30 s (its --shutdown-timeout) after SIGTERM: python -m outgrow.train.launch takes the "
        "same arguments, keeps the status and waits for the saving"
    )


class Stopped(Exception):
    """The run was asked to stop; it has saved a checkpoint, and the same command resumes from it.

    Attributes:
        status: to end the process with.
    """

    def __init__(self, text: str, signal_name: str | None = None) -> None:
        super().__init__(text)
        self.status = INTERRUPTED if signal_name == signal.SIGINT.name else REQUEUE


@contextmanager
def watched() -> Iterator[Callable[[], str | None]]:
    """Note SIGNALS during the block; yields a function that names the first one that came, or None.

    The end of the launcher that started this process counts as one: nobody would stop it any more, or end it
    with the others. Python lets only a process's main thread take signals; on another thread none is watched.
    """
    came: list[str] = []
    launched = LAUNCHED in os.environ
    launcher = os.getppid()

    def asked() -> str | None:
        if launched and not came and os.getppid() != launcher:
            came.append("the end of its launcher")
        return came[0] if came else None

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT.name in came:
            raise KeyboardInterrupt
        came.append(signal.Signals(number).name)

    main = threading.current_thread() is threading.main_thread()
    # ignored: its parent takes care of it
    own = SIGNALS if main else ()
    heard = [number for number in own if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Check whether `flag` is true on any process; all of them have to ask, and all get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return (
        accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum").item() > 0
    )
