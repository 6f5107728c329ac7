"""Memory policy of the C library on the CPU.

PyTorch returns every freed CPU tensor to malloc. For large ones glibc then gives the pages back to the system, and
the next tensor of that size pays for them again, page by page; long sequences spend much of their time so.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory for the next tensor, for the rest of the process. The process then holds its
    peak. False where the C library is not glibc, which changes nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
