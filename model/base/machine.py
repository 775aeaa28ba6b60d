"""The machine that this process runs on: its cores and its processor's name."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's own name, as Linux tells it; elsewhere the platform's, or "cpu"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            _, _, name = line.partition(":")
            return name.strip()
    return platform.processor() or "cpu"


def machine() -> str:
    """The processor, the cores of it that this process may use, and the system, in a line of a table."""
    return f"{processor()}, {cores()} cores, {platform.system()} {platform.release()}"
