"""torchrun with this trainer's exit status: a run under it ends with what it ends with alone.

python -m outgrow.train.launch --nproc_per_node 2 -m outgrow.train experiment=tiny growth=lossless

The arguments are torchrun's.

torchrun itself ends with status 1 and a traceback whatever its processes ended with, and gives them 30 s
after a SIGTERM. Here SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C go to the processes, which save, however long that
takes, and the status is theirs: 75 asked to stop, everything saved; 130 the same by Ctrl-C; 2 a fault in what
was asked; 0 done.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from outgrow.model.base.interrupt import started

INTERRUPTED = 130  # as a shell ends what Ctrl-C stopped
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
passed: set[int] = set()  # signals that have come


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun on `arguments`; the status of the first process that failed, 0 where none did."""
    options = list(sys.argv[1:] if arguments is None else arguments)
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background has Ctrl-C
            signal.signal(number, pass_on)
    # which takes a second or two: a signal may come meanwhile
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--signals-to-handle", "SIGHUP,SIGQUIT", *options])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status: int = failure.exitcode
        if status >= 0:
            return status
        if -status in passed:  # it came before the process could take it
            return status_after(-status)
        name = signal.Signals(-status).name
        print(
            f"error: process {rank} was ended by {name}; the same command goes on from the newest checkpoint",
            file=sys.stderr,
        )
        return 128 - status
    return 0


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the processes that torchrun has started; end where it has not started any yet."""
    passed.add(number)
    tasks = Path("/proc/self/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    if not children:
        sys.exit(status_after(number))
    for child in children:
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(child, number)


def status_after(number: int) -> int:
    """The status to end with for a signal that came before anything was there to save."""
    return INTERRUPTED if number == signal.SIGINT else os.EX_TEMPFAIL


if __name__ == "__main__":
    started()
    sys.exit(main())
