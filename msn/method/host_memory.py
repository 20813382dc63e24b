"""What glibc does with memory that is freed and soon taken again; other systems are left alone.

Every step on the CPU takes and frees the same gigabytes, every worker the same photographs. Having
the kernel map and clear them anew costs about 5 % of a step and a tenth of decoding and of views
made on the CPU, so they are kept. Chunks leave holes in kept memory, and the next one lies partly
beside them; giving holes back before a network's chunks and before each pass whose activations stay
bounds that.
"""

import ctypes
import errno
import sys
from functools import cache
from typing import Any

import torch

# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_PHOTOGRAPH = 32 << 20  # bytes, ten megapixels; older glibc allows no more


# What allocators of torch say in a plain RuntimeError: the CPU's, MPS', those of CUDA's libraries.
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED", "std::bad_alloc")


def keep_freed_memory() -> bool:
    """Keep what is freed for the next step; for the whole process, for good.

    Returns:
        Whether the C library could be told.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def keep_photographs() -> bool:
    """Keep what images of everyday size take, for a worker; larger ones go back to the system.

    Without the second half every worker would hold the largest image it ever met.

    Returns:
        Whether the C library could be told.
    """
    libc = _glibc()
    if libc is None:
        return False
    # A worker may have been forked from a process that keeps everything.
    options = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: _PHOTOGRAPH, _TRIM_THRESHOLD: 2 * _PHOTOGRAPH}
    return all(libc.mallopt(option, value) for option, value in options.items())


def give_back_free_memory() -> None:
    """Give every whole page that holds nothing back to the system, wherever it lies."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a device does not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or "Cannot allocate memory" in str(error)
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
