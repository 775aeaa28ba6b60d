"""Work spread over processes, its results in the order of the jobs: nothing downstream can tell how many there were."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

from outgrow.model.base.errors import UserError

AHEAD = 2  # jobs in flight for each worker: one at work, one waiting
Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(count: int) -> Iterator[Run]:
    """Yield `run(function, jobs)`: function(*job) for each job, in order; jobs are drawn as they are needed, so memory is bounded.

    One worker is this process itself. More are processes of their own that end with this one, however it ends.

    Raises:
        UserError: a worker was killed.
    """
    if count == 1:
        yield lambda function, jobs: (function(*job) for job in jobs)
        return
    executor = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin)
    try:
        yield partial(_in_order, executor, AHEAD * count)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for want of memory; start the same command again with fewer of them "
            f"(data.workers={max(1, count // 2)}): it goes on where it stopped. (A script that calls prepare has to do so under "
            "if __name__ == '__main__', or with data.workers=1.)"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _in_order(executor: ProcessPoolExecutor, most: int, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for job in jobs:
        waiting.append(executor.submit(function, *job))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _begin() -> None:
    """In a worker: leave Ctrl-C to the parent, end when it ends (a parent that is killed cannot say so), and use one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel
    threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
