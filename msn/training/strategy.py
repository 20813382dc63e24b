"""Compilation, memory reuse and sharding (FSDP2) of networks; none changes a step's numbers."""

import ctypes
import inspect
import logging
import sys
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from msn.compilers import missing_compiler
from msn.errors import UserError
from msn.method.distributed import whole
from msn.method.mae import MAE
from msn.method.network import Network

log = logging.getLogger(__name__)


def compilation(setting: bool | str) -> bool | None:
    """Read the setting `compile`: true, false, or None for auto.

    Raises:
        UserError: if it is something else.
    """
    if setting == "auto":
        return None
    if isinstance(setting, bool):
        return setting
    raise UserError(f"compile must be true, false or auto, got {setting!r}")


def make_fast(network: Network, device: torch.device, *, wanted: bool | None) -> bool:
    """Prepare a network that is on its device for training.

    Args:
        network: changed in place; parameters and their names stay.
        device: of the training.
        wanted: compile the blocks; None does so on CUDA only (on a CPU it measured no faster).

    Returns:
        Whether the blocks are compiled.
    """
    keep_freed_memory()
    compiles = device.type == "cuda" if wanted is None else wanted
    if compiles and (missing := missing_compiler(device.type)):
        log.warning("compile: there is no %s; the blocks are not compiled", missing)
        compiles = False
    if compiles:
        compile_blocks(network)
    return compiles


def compile_blocks(network: Network, *, backend: str = "inductor") -> None:
    """Compile every block in place; parameter names stay as they are.

    All blocks share a few graphs: of MSN one with gradients for the anchor, one without for the
    target, and two more for the last blocks, which compute class tokens only; of MAE one each for
    trunk and decoder; under `chunk_size` as many again if the last chunk is smaller. Shapes are
    fixed, as all steps have the same ones.

    Args:
        network: before or after it was moved to its device.
        backend: of `torch.compile`.
    """
    # DDP's buckets would split each block's graph; blocks are small and need no such overlap.
    torch._dynamo.config.optimize_ddp = False
    for block in chain(*network.stacks):
        block.compile(backend=backend, dynamic=False)


def keep_freed_memory() -> None:
    """Keep freed pieces of up to 32 MB for the next step (glibc only; for the whole process).

    Steps on the CPU, and data workers (which inherit the setting), allocate the same sizes again
    and again; mapping and clearing them anew is slow. Larger pieces are returned, so that no worker
    holds the largest image it ever met.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


# Gradients are views of DDP's buckets, not copies. Running statistics are computed from all
# processes, so they need not be broadcast.
_KNOWN = inspect.signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers"
DDP_OPTIONS = {"gradient_as_bucket_view": True, _BUFFERS: False}


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all processes, with checkpoints of whole tensors in one file."""

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def setup_environment(self) -> None:
        """Shard over all processes, whose number is known only now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(network: Network, mesh: DeviceMesh) -> None:
    """Shard a network in place: every block by itself, the rest together.

    Optimiser and EMA work element by element, so they give the same numbers on the parts.

    Args:
        network: on any device.
        mesh: one axis, over all processes.
    """
    for block in chain(*network.stacks):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if isinstance(network, MAE):  # trains by `learn`, not by `forward`
        register_fsdp_forward_method(network, "learn")


def whole_state(network: Network) -> dict[str, Tensor]:
    """The network's state with whole tensors on the host; a collective if it is sharded."""
    state: dict[str, Any] = network.state_dict()
    return {name: whole(value).cpu() for name, value in state.items()}
