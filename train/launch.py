"""torchrun with this trainer's exit status: a run under it ends with what it ends with alone.

python -m outgrow.train.launch --nproc_per_node 2 -m outgrow.train experiment=tiny growth=lossless

The arguments are torchrun's.

torchrun itself ends with status 1 and a traceback whatever its processes ended with, and gives them 30 s
after a SIGTERM. Here SIGTERM, SIGUSR1 and SIGUSR2 go to the processes, which save, however long that takes,
and the status is theirs: 75 asked to stop, everything saved; 2 a fault in what was asked; 0 done.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from outgrow.model.base.interrupt import started

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun on `arguments`; the status of the first process that failed, 0 where none did."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    options = list(sys.argv[1:] if arguments is None else arguments)
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *options])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except KeyboardInterrupt:
        return 130
    return 0


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the processes that torchrun has started."""
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), number)


if __name__ == "__main__":
    started()
    sys.exit(main())
