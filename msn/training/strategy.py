"""What makes a step fast without changing it, and networks cut over the processes (FSDP2)."""

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
    """Prepare a network that lies on its device for training.

    Args:
        network: changed in place; parameters and their names stay.
        device: where it will train.
        wanted: compile the blocks; None does on CUDA alone (on a CPU it measured no faster).

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

    All blocks share the same few graphs: of MSN one with gradients for the anchor, one without for
    the target, and the same two where class tokens alone are wanted; of MAE one for the trunk and
    one for the decoder; under `chunk_size` as many again if the last chunk is smaller. Shapes are
    fixed, for a step's views always have the same ones.

    Args:
        network: before or after it was moved to its device.
        backend: of `torch.compile`.
    """
    # DDP's buckets would cut each block's graph in two; blocks are small and need no such overlap.
    torch._dynamo.config.optimize_ddp = False
    for block in chain(*network.stacks):
        block.compile(backend=backend, dynamic=False)


def keep_freed_memory() -> None:
    """Keep freed pieces of up to 32 MB for the next step (glibc only; for the whole process).

    A step on the CPU takes and frees the same memory again and again, a data worker (which inherits
    the setting) the same photographs. Mapping and clearing it anew each time is slow. Larger pieces
    go back, so that no worker holds the largest image it ever met.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


# Gradients lie in the buckets in which they are sent, not in a copy. Running statistics come from
# gathered numbers, so they are the same on every process and need not be sent.
_KNOWN = inspect.signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers"
DDP_OPTIONS = {"gradient_as_bucket_view": True, _BUFFERS: False}


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all processes, with checkpoints that are one file of whole tensors."""

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def setup_environment(self) -> None:
        """Let every process hold a part; known only now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(network: Network, mesh: DeviceMesh) -> None:
    """Cut a network in place: every block by itself, the rest together.

    Optimiser and EMA work on the parts, element by element, and so give the same numbers.

    Args:
        network: on any device.
        mesh: one axis, over all processes.
    """
    for block in chain(*network.stacks):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if isinstance(network, MAE):  # whose training enters elsewhere than by `forward`
        register_fsdp_forward_method(network, "learn")


def whole_state(network: Network) -> dict[str, Tensor]:
    """The network's state with whole tensors on the host; a collective if it is cut."""
    state: dict[str, Any] = network.state_dict()
    return {name: whole(value).cpu() for name, value in state.items()}
