"""The process of train/corpus/synthetic/checker.py: reads programs, limits itself, runs them, tells the
result of each.

python -I -S worker.py SECONDS MEMORY_BYTES [MODULE…]
    stdin: [[program, what it prints], …]    stdout: a JSON line for each

A program that may print anything has null there; one may import the modules named here and those named to it.
"""

import io
import json
import os
import resource
import signal
import sys
from importlib import import_module

# loaded before the limits
ALLOWED = ("bisect", "collections", "functools", "heapq", "itertools", "math", "operator", "re", "string")

FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "open",
    "pty.",
    "webbrowser.",
    "urllib.",
    "sys.addaudithook",
)
PRINTED = 10_000  # characters of output that are kept


class TooLong(BaseException):
    """The end of a program's time; no Exception, so that no program catches it by accident."""


def limit(seconds: float, memory_bytes: int) -> None:
    """No new descriptors, nothing written to files, bounded memory; each program has `seconds`, and the
    kernel watches over that."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lowest = os.dup(0)  # the lowest free number: nothing can be opened at or above the limit
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, lowest))

    def refuse(event: str, arguments: object) -> None:
        if running and event.startswith(FORBIDDEN):
            raise PermissionError(f"a program may not use {event}")

    def too_long(number: int, frame: object) -> None:
        raise TooLong(f"longer than {seconds:g} s")

    sys.addaudithook(refuse)
    signal.signal(signal.SIGPROF, too_long)


running = False


def run(program: str, prints: str | None, seconds: float) -> str | None:
    """None, or what went wrong."""
    global running
    output = sys.stdout
    sys.stdout = io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of its own computing: a busy machine fails no program
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    # where a program holds off the signal, in C code for instance
    hard = int(cpu.ru_utime + cpu.ru_stime + seconds) + 2
    _, ceiling = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (hard, ceiling))
    try:
        running = True
        exec(compile(program, "program", "exec"), {"__name__": "program"})
        printed = sys.stdout.getvalue()[:PRINTED]
        return None if prints in (None, printed) else f"it printed {printed!r}, not {prints!r}"
    except TooLong as error:
        return str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:500]
    finally:
        running = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout = output


def main() -> None:
    """Run the programs that standard input lists under the limits of the command line, and print a line of
    JSON for each result."""
    seconds = float(sys.argv[1])
    memory_bytes = int(sys.argv[2])
    programs = json.load(sys.stdin)
    for name in (*ALLOWED, *sys.argv[3:]):
        import_module(name)
    limit(seconds, memory_bytes)
    for program, prints in programs:
        print(json.dumps([run(program, prints, seconds)]), flush=True)


if __name__ == "__main__":
    main()
