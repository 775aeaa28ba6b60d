"""The C library's allocator, told to keep what a step frees for the next one.

A step on a CPU frees and allocates the same tensors every time. glibc hands those above its threshold back to
the system, which has to clear each of their pages again when they are next touched.
"""

from __future__ import annotations

import ctypes

# glibc's names and numbers (malloc.h)
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3

MIB = 2**20
KEPT = {
    # a larger tensor goes back to the system at once: glibc's own upper limit
    M_MMAP_THRESHOLD: 32 * MIB,
    # so much free memory stays with the process
    M_TRIM_THRESHOLD: 1024 * MIB,
    # asked for at a time
    M_TOP_PAD: 64 * MIB,
}


def keep_freed_memory() -> None:
    """Let the process keep up to 1 GiB of freed memory until it ends, where the C library is glibc, which
    alone has these settings; no value that is computed depends on them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in KEPT.items():
            mallopt(parameter, value)
