"""Networks that do not fit: parameters, target and moments cut over the processes (FSDP2)."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from msn.method.distributed import whole
from msn.method.network import MSN


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


def shard(network: MSN, mesh: DeviceMesh) -> None:
    """Cut a network in place: every block of both trunks by itself, the rest together.

    Optimiser and EMA work on the parts, element by element, and so give the same numbers.

    Args:
        network: on any device.
        mesh: one axis, over all processes.
    """
    for encoder in (network.anchor, network.target):
        for block in encoder.trunk.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole_state(network: MSN) -> dict[str, Tensor]:
    """The network's state with whole tensors on the host; a collective if it is cut."""
    state: dict[str, Any] = network.state_dict()
    return {name: whole(value).cpu() for name, value in state.items()}
