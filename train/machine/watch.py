"""A process that hangs: the others name it and end, where the library would let them wait for half an hour
and name nobody.

A process that dies is noticed at once. One that stands still (a file system that does not answer, a stopped
process, a stuck device) leaves the others inside the next exchange of gradients. So each process of a
distributed run has a thread that gives signs of life: which step its main thread is in, and at which line.
Where no step ends for `train.hang_seconds`, the signs are read, and the run ends with its culprit's name; the
same command goes on from the newest checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch

PROJECT = "outgrow."
TORCH = str(Path(torch.__file__).parent)
HUNG = 1  # the status that all processes end with


@dataclass(frozen=True)
class Sign:
    """A sign of life of one process."""

    beat: int  # grows while the process lives
    step: int  # that its main thread has come to
    line: str  # of its main thread: the innermost of this project
    waits: bool  # inside the library, or for the device: for the others
    host: str


class Watch:
    """Gives signs of this process, and reads those of all where no step ends in time.

    Args:
        store: that all processes share; once started, the watching thread's alone.
        limit: seconds.
    """

    def __init__(self, store: torch.distributed.Store, process: int, processes: int, limit: float) -> None:
        self.store = store
        self.process = process
        self.processes = processes
        self.limit = limit
        self.pause = min(10.0, limit / 10)
        self.count = 0
        self.since = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch_store, daemon=True)

    def start(self) -> None:
        """Give the first sign before any step, so that a process that stands still in its first one can be
        named; then begin to watch.
        """
        self._give(0)
        self.thread.start()

    def step(self) -> None:
        """The main thread has come to its next step, or its next evaluation."""
        self.count += 1
        self.since = time.monotonic()

    def _watch_store(self) -> None:
        """Watch as long as there is a store: where process 0 has ended with it, the next exchange tells."""
        with suppress(torch.distributed.DistError):
            self._watch()

    def _watch(self) -> None:
        beat = 0
        while not self.ended.wait(self.pause):
            beat += 1
            self._give(beat)
            if time.monotonic() - self.since > self.limit:
                self._end(beat)

    def _give(self, beat: int) -> None:
        line, waits = standing()
        sign = Sign(beat, self.count, line, waits, socket.gethostname())
        text = json.dumps(asdict(sign))
        self.store.set(str(self.process), text)

    def _signs(self) -> list[Sign | None]:
        return [self._sign(str(process)) for process in range(self.processes)]

    def _sign(self, process: str) -> Sign | None:
        """The newest sign of a process; None where it has given none."""
        if not self.store.check([process]):
            return None
        return Sign(**json.loads(self.store.get(process)))

    def _end(self, beat: int) -> NoReturn:
        """Name the process that keeps the others waiting, and end this one, as its main thread cannot."""
        before = self._signs()
        for later in range(1, 4):
            time.sleep(self.pause)
            self._give(beat + later)
        named, story = blame(before, self._signs())
        everyone = range(self.processes)
        waiting = [process for process in everyone if process not in named]
        if self.process == min(waiting, default=0):
            way_out = (
                "The same command goes on from the newest checkpoint; where a step takes so long, raise "
                "train.hang_seconds"
            )
            print(
                f"error: no step has ended for {self.limit:g} s: {story}. {way_out}",
                file=sys.stderr,
                flush=True,
            )
        else:
            # the first process to end takes the others with it: let the words come first
            time.sleep(2 * self.pause)
        os._exit(HUNG)


def blame(before: Sequence[Sign | None], after: Sequence[Sign | None]) -> tuple[list[int], str]:
    """The processes that keep the others waiting, by two signs of each some time apart, and what to say of
    them.

    A process without a new sign stands still altogether. Else one whose main thread does not wait for others
    is the one waited for; else one that is behind. Where none of this tells, all are named with where they
    stand.
    """
    # Who stands still, who works while others wait, and who is behind.
    silent = []
    pairs = zip(before, after, strict=True)
    for process, (earlier, later) in enumerate(pairs):
        if later is None or later == earlier:
            silent.append(process)
    signs_by_process = {process: sign for process, sign in enumerate(after) if sign is not None}
    steps = [sign.step for sign in signs_by_process.values()]
    newest = max(steps, default=0)
    busy = [process for process, sign in signs_by_process.items() if not sign.waits]
    behind = [process for process, sign in signs_by_process.items() if sign.step < newest]
    # The first of these groups that has anyone is named; busy or behind, all together tell nothing.
    telling = [group for group in (busy, behind) if len(group) < len(signs_by_process)]
    groups = [silent, *telling, list(signs_by_process)]
    named = next(filter(None, groups), [])
    sentences = []
    for process in named:
        sign = signs_by_process.get(process)
        sentences.append(_sentence(process, sign, process in silent))
    return named, "; ".join(sentences)


def _sentence(process: int, sign: Sign | None, silent: bool) -> str:
    if sign is None:
        return f"process {process} has given no sign of life"
    who = f"process {process} on {sign.host}"
    if silent:
        return f"{who} gives no sign of life since it was at {sign.line}"
    return f"{who} stands at {sign.line}"


def standing() -> tuple[str, bool]:
    """The innermost line of this project that the main thread is in, and whether it waits there."""
    main = threading.main_thread().ident or 0
    innermost = sys._current_frames().get(main)
    frame = innermost
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(PROJECT):
            break
        frame = frame.f_back
    if innermost is None or frame is None:
        return "its end", False
    code = innermost.f_code
    waits = code.co_filename.startswith(TORCH) or code.co_qualname == "Step.__call__"
    path = module.removeprefix(PROJECT).replace(".", "/")
    function = frame.f_code.co_name
    return f"{path}.py, line {frame.f_lineno} ({function})", waits


@contextmanager
def watching(
    store: torch.distributed.Store | None,
    process: int,
    processes: int,
    limit: float | None,
) -> Iterator[Callable[[], None]]:
    """Watch over the block, which calls what is yielded before each step and evaluation.

    One process, or no limit: no watch.
    """
    if store is None or limit is None:
        yield lambda: None
        return
    watch = Watch(store, process, processes, limit)
    watch.start()
    try:
        yield watch.step
    finally:
        watch.ended.set()
        watch.thread.join()
