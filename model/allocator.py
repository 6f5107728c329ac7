"""glibc's allocator, told to keep the memory that tensors free."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BYTES = 1 << 30
# glibc's own settings of the same things, which somebody sets on purpose.
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Makes this process reuse freed memory up to 1 GiB a block instead of returning it to the system.

    By default glibc maps every large tensor anew, and the page faults of first touch cost more than much of the
    arithmetic at long lengths. The price is memory: blocks of unequal size leave holes between them. Call it once,
    before large tensors exist. Returns whether it took effect: with glibc, and unless the environment sets its
    allocator, by one of `SETTINGS`.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _BYTES) and mallopt(_M_TRIM_THRESHOLD, _BYTES))
