"""A process of the pool: one training run, its output sent to a log file."""

from __future__ import annotations

import os
import signal
import sys
import time
from threading import Thread
from typing import TYPE_CHECKING

from outgrow.model.base.errors import UserError, in_one_line

if TYPE_CHECKING:
    from outgrow.experiments.study_file import Job


def initialise(threads: int) -> None:
    """Give this process its share of the cores, before torch is imported and again after.

    End it when the study is killed.
    """
    # a terminal sends Ctrl-C to all; the study's own process says what becomes of the runs
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(threads)


def _end_with(parent: int) -> None:
    """Wait until `parent` is gone, however it ended, then end this process: a run that nobody waits for takes
    cores from the next.
    """
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def work(job: Job, log: str) -> str:
    """Train a run; return its folder.

    Everything it prints goes to the file `log`.
    """
    from outgrow.train.loop import train_horizons
    from outgrow.train.run.signals import Stopped

    sys.stdout.flush()
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        folders = train_horizons(job.settings)
        return str(folders[-1])
    except UserError:
        raise
    except Stopped as stopped:  # it has saved; this process must not wait for another run
        print(stopped, flush=True)
        os._exit(stopped.status)
    except (
        Exception
    ) as error:  # an error of a library may not survive the way between processes; its words do
        import traceback

        traceback.print_exc()
        raise RuntimeError(in_one_line(error, 500)) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
