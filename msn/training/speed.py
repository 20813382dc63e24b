"""What makes a step fast without changing it: compiled blocks, kernels, kept memory."""

import ctypes
import logging
import os
import shutil
import sys

import torch

from msn.errors import UserError
from msn.method.network import MSN

log = logging.getLogger(__name__)

# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def compilation(wish: bool | str) -> bool | None:
    """Read the setting `compile`: true, false, or None for auto.

    Raises:
        UserError: if it is something else.
    """
    if wish == "auto":
        return None
    if isinstance(wish, bool):
        return wish
    raise UserError(f"compile must be true, false or auto, got {wish!r}")


def make_fast(
    network: MSN,
    device: torch.device,
    *,
    compile_wish: bool | None,
    use_kernels: bool,
    spare_memory: bool,
) -> bool:
    """Prepare a network that lies on its device for training.

    Args:
        network: changed in place; parameters and their names stay.
        device: where it will train.
        compile_wish: compile the blocks; None does on CUDA alone (on a CPU it measured no faster).
        use_kernels: take `msn.method.kernels` where they are faster.
        spare_memory: on the CPU, give freed memory back at once instead of keeping it.

    Returns:
        Whether the blocks are compiled.
    """
    for encoder in (network.anchor, network.target):
        for block in encoder.trunk.blocks:
            block.use_kernels = use_kernels  # type: ignore[assignment]
    if device.type == "cpu":
        set_allocator(keep=not spare_memory)
    compiles = device.type == "cuda" if compile_wish is None else compile_wish
    if compiles and device.type == "cpu" and not _has_compiler():
        log.info("compile: there is no C++ compiler (g++, or what CXX names); going on without")
        compiles = False
    if compiles:
        compile_blocks(network)
    return compiles


def compile_blocks(network: MSN, *, backend: str = "inductor") -> None:
    """Compile every block of both trunks in place; parameter names stay as they are.

    All blocks share the same few graphs: one with gradients for the anchor, one without for the
    target, and the same two where class tokens alone are wanted; under `chunk_size` as many again
    if the last chunk is smaller. Shapes are fixed, for a step's views always have the same ones.

    Args:
        network: before or after it was moved to its device.
        backend: of `torch.compile`.
    """
    for encoder in (network.anchor, network.target):
        for block in encoder.trunk.blocks:
            block.compile(backend=backend, dynamic=False)


def set_allocator(*, keep: bool) -> bool:
    """Tell glibc what to do with memory that a step frees; for the whole process, for good.

    Every step takes and frees the same gigabytes; having the kernel map and clear them anew costs
    about 5 % of a step on the CPU. The tensors of chunks, though, leave holes in memory that is
    kept (by glibc's own rules as well): there it costs a third more than lies in it.

    Args:
        keep: keep it for the next step; False gives every large block back when it is freed.

    Returns:
        Whether the C library could be told; others than glibc are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    if keep:
        return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    return bool(mallopt(_MMAP_MAX, 2**16) and mallopt(_MMAP_THRESHOLD, 2**20))


def _has_compiler() -> bool:
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(name is not None and shutil.which(name) is not None for name in names)
