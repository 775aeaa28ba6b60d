"""A check of programs by running them under limits against accidents; it is no prison for hostile code.

Many run in one process, so that it is fast. The process can open no file and no socket (the kernel's limit on
descriptors is what it already holds), writes nothing, and has little memory and time: an endless loop, a huge
list or a stray `open` ends one program and nothing else. The programs are this package's own, and mean no
harm. Whoever means harm is not held by it: the process runs as the user, reads what the user may read through
descriptors that are open, and nothing separates it from the rest of the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from outgrow.train.corpus.synthetic.item import Item

WORKER = Path(__file__).with_name("worker.py")
SECONDS = 2.0  # of computing, of one program
BATCH_SECONDS = 600.0  # of a whole process, however its programs end
MEMORY_BYTES = 512 * 2**20


def failures(
    items: Sequence[Item],
    *,
    seconds: float = SECONDS,
    memory_bytes: int = MEMORY_BYTES,
    modules: Sequence[str] = (),
) -> list[str | None]:
    """Run each item's program: None where it ran through and printed what it should, else what went wrong.

    A program that takes the process down with it costs itself alone: the others are run in a new one.

    Args:
        modules: that programs may import beside the worker's own list.
    """
    faults: list[str | None] = []
    while len(faults) < len(items):
        faults += _batch(items[len(faults) :], seconds, memory_bytes, modules)
    return faults


def _batch(
    items: Sequence[Item], seconds: float, memory_bytes: int, modules: Sequence[str]
) -> list[str | None]:
    """The results of as many items as one process managed, and at least of one."""
    command = [sys.executable, "-I", "-S", str(WORKER), str(seconds), str(memory_bytes), *modules]
    pairs = [(item.program, item.prints) for item in items]
    programs = json.dumps(pairs)
    try:
        process = subprocess.run(
            command,
            input=programs,
            capture_output=True,
            text=True,
            timeout=BATCH_SECONDS,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
        )
        output = process.stdout
        last_words = process.stderr.strip()[-200:]
        end = f"it ended its process ({process.returncode}): {last_words}"
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        output = raw.decode() if isinstance(raw, bytes) else raw
        end = "it kept its process from ending"
    results: list[str | None] = [json.loads(line)[0] for line in output.splitlines()]
    if len(results) < len(items):
        results.append(end)
    return results
