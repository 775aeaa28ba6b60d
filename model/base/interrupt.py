"""Ctrl-C and SIGTERM in a program's first moments, while it imports its libraries: it ends as ever, without a
traceback of theirs. And SIGTERM later on, which may end a program as Ctrl-C does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # by which queues stop what may go on later


def starting(is_command: bool = False) -> None:
    """Let Ctrl-C end the process in silence until `started`, and STOPS with the status that asks for the same
    command again; called first by packages that are run as `python -m`, and idle elsewhere.

    Args:
        is_command: the process is ours whatever it was started as: the console command.
    """
    module = sys.argv[:1] == ["-m"]  # as Python has it while it looks for the module that it was asked to run
    if not (is_command or module):
        return
    # a shell may have switched Ctrl-C off
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in STOPS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(os.EX_TEMPFAIL)


def started() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, which the program's door tells in its own words, and STOPS
    mean what they did.

    What a terminal's or log's encoding has no sign for (→ in ASCII, a file's name that is no text) is printed
    as its number from here on: no door fails by what it says.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in STOPS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


class Terminated(KeyboardInterrupt):
    """SIGTERM, or a signal that stands for it, taken as Ctrl-C is."""


@contextmanager
def terminable(*signals: signal.Signals) -> Iterator[None]:
    """Raise Terminated where SIGTERM, or one of `signals`, comes in the block, so that what a Ctrl-C tidies
    up is tidied up then too.

    A signal that is ignored, or that another takes already, is left to that.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may take signals
        yield
        return
    untaken = [number for number in (signal.SIGTERM, *signals) if signal.getsignal(number) is signal.SIG_DFL]
    for number in untaken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in untaken:
            signal.signal(number, signal.SIG_DFL)
