"""What glibc does with memory that a training step on the CPU frees; other systems are left alone.

Every step takes and frees the same gigabytes; having the kernel map and clear them anew costs
about 5 % of a step, so they are kept. Chunks leave holes in kept memory, and the next one lies
partly beside them; giving the holes back at each chunk's first pass bounds that.
"""

import ctypes
import sys
from functools import cache
from typing import Any

# M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep what is freed for the next step; for the whole process, for good.

    Returns:
        Whether the C library could be told.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def give_back_free_memory() -> None:
    """Give every whole page that holds nothing back to the system, wherever it lies."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
