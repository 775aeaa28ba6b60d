"""A pool of worker processes on this machine, over concurrent.futures.

datatrove's own local pool waits for ever when a worker is killed (so does its Ray executor's, inside a job);
this one says so.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

from outgrow.model.base.errors import UserError

AHEAD = 8  # tasks in flight for each worker: one at work, some for the seconds that `meanwhile` takes
Arguments = Iterable[tuple[Any, ...]]  # of each call
Meanwhile = Callable[[], None]  # what this process does while its workers do the first jobs
Run = Callable[[Callable[..., Any], Arguments, Meanwhile], Iterator[Any]]


def begin_imports(count: int) -> None:
    """Start the process that `count` workers are forked from, where that is more than one: it imports the
    pipeline for all of them, while this process goes on. Once it runs, this does nothing.
    """
    if count > 1:
        forkserver.set_forkserver_preload([f"{__package__}.pipeline"])
        forkserver.ensure_running()


@contextmanager
def pool(count: int) -> Iterator[Run]:
    """Yield `run(function, jobs, meanwhile)`: function(*job) for each job, in order; jobs are drawn as they
    are needed, so memory is bounded.

    One worker is this process itself, which does `meanwhile` first. More are processes of their own that end
    with this one, however it ends.

    Raises:
        UserError: a worker was killed.
    """
    if count == 1:
        yield _here
        return
    begin_imports(count)
    executor = ProcessPoolExecutor(count, mp_context=get_context("forkserver"), initializer=_begin)
    try:
        yield partial(_in_order, executor, AHEAD * count)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for want of memory; start the same command again "
            f"with fewer of them (data.workers={max(1, count // 2)}): it goes on where it stopped. (A "
            "script that calls prepare has to do so under if __name__ == '__main__', or with "
            "data.workers=1.)"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _here(function: Callable[..., Any], jobs: Arguments, meanwhile: Meanwhile) -> Iterator[Any]:
    meanwhile()
    for job in jobs:
        yield function(*job)


def _in_order(
    executor: ProcessPoolExecutor,
    most: int,
    function: Callable[..., Any],
    jobs: Arguments,
    meanwhile: Meanwhile,
) -> Iterator[Any]:
    left = iter(jobs)
    waiting = deque(executor.submit(function, *job) for job in islice(left, most))
    meanwhile()
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(executor.submit(function, *job) for job in islice(left, 1))


def _begin() -> None:
    """Prepare a worker: leave Ctrl-C to the parent, end when it ends (a parent that is killed cannot say so),
    and use one core.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def end_with_parent() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
