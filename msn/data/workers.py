"""Data loaders and their worker processes: transport of batches, and errors in one line.

A batch travels in shared memory without a copy. If that is full (a container's is often 64 MB) or
too few files may be open, it travels through the worker's pipe, which is slower.
"""

from __future__ import annotations

import errno
import logging
import math
import mmap
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from msn.errors import UserError
from msn.files import TOO_MANY_OPEN

log = logging.getLogger(__name__)

_SHARED_MEMORY = "/dev/shm"
_SPARE = 4 << 20  # bytes of shared memory left to others, for instance locks
_FILES_A_WORKER = 4  # that this process keeps open: two pipes
_FILES_BESIDE = 8  # for logs, checkpoints and what reads images
# Messages of torch's allocators in a plain RuntimeError: of the CPU, MPS and CUDA's libraries.
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED", "std::bad_alloc")
_may_share = True  # whether this worker's batches may lie in shared memory
_said = mmap.mmap(-1, 1)  # whether some process has logged that shared memory is short


def make_loader(
    images: Dataset[Any],
    *,
    num_workers: int,
    collate: Callable[[Any], Any] | None = None,
    **options: Any,
) -> DataLoader:
    """A loader whose workers send batches by shared memory or, if that is short, by pipe.

    Args:
        images: the data set.
        num_workers: processes; 0 reads in this one.
        collate: makes a batch of items; None takes `stack`.
        options: of `DataLoader`.

    Raises:
        UserError: the limit of open files is too low for so many workers.
    """
    free = open_files_limit() - _open_files()
    # Beside workers that stay, those of an evaluation come and go.
    times = 2 if options.get("persistent_workers") else 1
    most = max(0, free // times - _FILES_BESIDE) // _FILES_A_WORKER
    if num_workers > most:
        raise UserError(
            f"data.num_workers={num_workers}: too many for the {open_files_limit()} files that may "
            f"be open ({max(0, free)} are left); {most} is the most, or raise `ulimit -n`"
        )
    # Each batch on its way in shared memory is an open file, here and in its worker.
    batches = num_workers * (options.get("prefetch_factor") or 2)
    shared = free >= 2 * (_FILES_BESIDE + _FILES_A_WORKER * num_workers + batches)
    return _Loader(
        images,
        num_workers=num_workers,
        collate_fn=_Send(collate or stack),
        worker_init_fn=partial(_prepare, may_share=shared),
        **options,
    )


class _Loader(DataLoader[Any]):
    def check_worker_number_rationality(self) -> None:
        """Nothing: users may want more workers than cores."""


def _prepare(number: int, *, may_share: bool) -> None:
    global _may_share
    _may_share = may_share
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        _heed_parent_alone()


def _heed_parent_alone() -> None:
    """End on SIGTERM of the parent, not on a cluster's SIGTERM to all processes.

    The parent still needs its workers to finish its step and to save.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def open_files_limit() -> int:
    """How many files this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


def _open_files() -> int:
    with suppress(OSError):
        return len(os.listdir("/dev/fd"))
    return 0


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a batch: in a worker shared memory if there is room, else private memory."""
    count = math.prod(shape) * dtype.itemsize
    if get_worker_info() is not None and _may_share and _fits(count):
        with suppress(RuntimeError):  # another worker has just taken the room
            storage = torch.UntypedStorage._new_shared(count)
            return torch.empty(0, dtype=dtype).set_(storage).view(shape)
    # NumPy asks the kernel for huge pages, which are cheaper to touch for the first time.
    return torch.from_numpy(np.empty(count, np.uint8)).view(dtype).view(shape)


def _fits(count: int) -> bool:
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:  # elsewhere it lies elsewhere
        return True
    if status.f_bavail * status.f_frsize >= count + _SPARE:
        return True
    if not _said[0]:
        _said[0] = 1
        log.warning(
            "shared memory (%s) is too small: batches travel through pipes, which is slower "
            "(docker: --shm-size=8g gives it more)",
            shared_memory(),
        )
    return False


def shared_memory() -> str:
    """Where shared memory is and its size."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return "of unknown size"
    return f"{_SHARED_MEMORY}, {status.f_blocks * status.f_frsize >> 20} MiB"


def shared_flags(count: int) -> Tensor:
    """Flags that start as False, bool [count], shared with all workers if possible."""
    flags = torch.zeros(count, dtype=torch.bool)
    with suppress(RuntimeError):
        flags.share_memory_()
    return flags


def stack(rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Collate rows of tensors, numbers and texts into columns; columns of texts are lists."""
    return tuple(_column(column) for column in zip(*rows, strict=True))


def _column(values: tuple[Any, ...]) -> Tensor | list[str]:
    first = values[0]
    if isinstance(first, str):
        return list(values)
    if not isinstance(first, Tensor):
        return torch.tensor(values)
    return torch.stack(values, out=empty((len(values), *first.shape), first.dtype))


class _Send:
    """Collates and, in a worker, sends tensors outside shared memory through the pipe as bytes.

    torch would make a file in shared memory for each small tensor.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, given: Any) -> Any:
        batch = self.collate(given)
        if get_worker_info() is None:
            return batch
        values = [_by_pipe(value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)


class _ByPipe:
    """A tensor that arrives as one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.from_numpy, (self.tensor.numpy(),)


def _by_pipe(value: Any) -> Any:
    return _ByPipe(value) if isinstance(value, Tensor) and not value.is_shared() else value


@contextmanager
def in_one_line(lower: Callable[[], str], then: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn errors that end workers, or of memory, into a line that says what to do.

    Args:
        lower: the advice to take less memory in this process.
        then: says how the work goes on.

    Raises:
        UserError: in place of such an error.
    """
    try:
        yield
    except (RuntimeError, OSError, MemoryError, UserError) as error:
        line = explain(error, lower)
        if line is None:
            raise
        raise UserError(f"{line}{then()}") from None


def less_memory(key: str, batch_size: int) -> str:
    """Advice to take less memory, for a key that sets the batch of a trunk."""
    if batch_size == 1:
        return f"{key} is 1 already; another device or a smaller backbone takes less"
    return f"{key}={batch_size // 2} takes less"


def explain(error: BaseException, lower: Callable[[], str]) -> str | None:
    """Reason and advice for an error of workers or memory; None for any other error.

    Args:
        error: of this process, or of a worker, which sends its type and its traceback as text.
        lower: see `in_one_line`.
    """
    text = str(error)
    in_worker = "DataLoader worker" in text
    fewer = "data.num_workers=N takes fewer"
    if isinstance(error, UserError):
        return text.rstrip().rpartition("UserError: ")[2] if text.startswith("Caught ") else None
    number = error.errno if isinstance(error, OSError) else None
    if number in TOO_MANY_OPEN or re.search("Too many open files|items of ancdata", text):
        return f"too many open files, the limit is {open_files_limit()} (`ulimit -n`): {fewer}"
    if re.search("shared memory|Bus error", text):
        return (
            f"a data worker found no room in shared memory ({shared_memory()}): `docker run "
            "--shm-size=8g` gives more, data.num_workers=0 needs none"
        )
    if re.search("can't start new thread|Resource temporarily unavailable", text):
        return f"too many processes and threads (`ulimit -u`): {fewer}"
    if is_out_of_memory(error):
        where = " in a data worker" if in_worker else ""
        advice = "data.num_workers=N takes fewer of them" if in_worker else lower()
        return f"out of memory{where}{_wanted(text)}: {advice}"
    if in_worker and isinstance(error, RuntimeError) and not text.startswith("Caught "):
        return f"{text.splitlines()[0].strip()} (out of memory? {fewer})"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the host or of a device does not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or "Cannot allocate memory" in str(error)
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _wanted(text: str) -> str:
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", text)
    if found is None:
        return ""
    if found[2] == "bytes":
        return f" ({int(found[1]) / 2**30:.2f} GiB more were wanted)"
    return f" ({found[1]} {found[2]} more were wanted)"
