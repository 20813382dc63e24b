"""Who started this process, and how many decide as one."""

from collections.abc import Callable, Mapping, MutableMapping
from typing import NamedTuple, TypeVar

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy

from msn.errors import UserError

T = TypeVar("T")

_FIRST_PORT = 15_000


class Launch(NamedTuple):
    """Processes that torchrun or srun has started, this one among them."""

    by: str
    processes: int
    processes_per_node: int

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.processes // self.processes_per_node


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """What torchrun or srun says in the environment; None where neither has started this process.

    Raises:
        UserError: if nodes have different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        launch = Launch(
            "torchrun", int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        )
    elif "SLURM_STEP_ID" in environment and SLURMEnvironment.detect():
        processes = int(environment["SLURM_NTASKS"])
        nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
        launch = Launch("srun", processes, max(1, processes // nodes))
    else:
        return None
    if launch.nodes * launch.processes_per_node != launch.processes:
        raise UserError(
            f"{launch.by} started {launch.processes} processes, which is no multiple of the "
            f"{launch.processes_per_node} on this node: every node must have the same number"
        )
    return launch


def join_launched_processes(environment: MutableMapping[str, str]) -> None:
    """Tell torch what srun says: its rendezvous reads the words of torchrun.

    Raises:
        UserError: see `read_launch`.
    """
    launch = read_launch(environment)
    if launch is None or launch.by != "srun" or launch.processes == 1:
        return
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "127.0.0.1"))
    environment.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    # Jobs that share a node seldom share the last digits of their number.
    job = int(environment.get("SLURM_JOB_ID", "0"))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + job % 10_000))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = str(launch.processes)


def fit_devices(
    launch: Launch | None, devices: int | str | list[int], num_nodes: int
) -> tuple[int | str | list[int], int]:
    """Number of devices a node and of nodes that fit how the run was started.

    Args:
        launch: see `read_launch`.
        devices: as set; "auto" takes one a started process.
        num_nodes: as set; 1 takes what was started.

    Raises:
        UserError: if several nodes are wished but nothing has started processes on them.
    """
    if launch is None:
        if num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={num_nodes}: several nodes are started by torchrun or srun"
            )
        return devices, num_nodes
    return launch.processes_per_node if devices == "auto" else devices, launch.nodes


def starts_processes(trainer: Trainer) -> bool:
    """Whether the trainer will start further processes itself, by running the command again."""
    strategy = trainer.strategy
    if trainer.world_size == 1 or not isinstance(strategy, ParallelStrategy):
        return False
    environment = strategy.cluster_environment
    return environment is not None and not environment.creates_processes_externally


def agree(trainer: Trainer, module: LightningModule, decide: Callable[[], T]) -> T:
    """Let the first of the started processes decide, and give all of them the answer.

    Args:
        trainer: of the run; its process group is set up for this, if it has one.
        module: which it will train.
        decide: called in the first process alone.

    Raises:
        UserError: in all processes, where `decide` raised it or an OSError.
    """
    if trainer.world_size == 1 or starts_processes(trainer):
        return decide()
    trainer.strategy.connect(module)
    trainer.strategy.setup_environment()
    answer: tuple[T | None, str | None] = (None, None)
    if trainer.is_global_zero:
        try:
            answer = (decide(), None)
        except (UserError, OSError) as error:
            answer = (None, str(error))
    value, mistake = trainer.strategy.broadcast(answer)
    if mistake is not None:
        raise UserError(mistake)
    return value  # type: ignore[return-value]
