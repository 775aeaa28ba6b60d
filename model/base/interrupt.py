"""Ctrl-C in a program's first moments, while it imports its libraries: it ends as ever, without a traceback
of theirs.
"""

from __future__ import annotations

import signal
import sys


def starting(asked: bool = False) -> None:
    """Let Ctrl-C end the process in silence until `started`; called first by packages that are run as `python
    -m`, and idle elsewhere.

    Args:
        asked: the process is ours whatever it was started as: the console command.
    """
    module = sys.argv[:1] == ["-m"]  # as Python has it while it looks for the module that it was asked to run
    # a shell may have switched Ctrl-C off
    is_pythons = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_pythons and (asked or module):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def started() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, which the program's door tells in its own words."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
