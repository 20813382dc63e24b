"""Detect the launcher; wait for its processes, not for ever; agree across ranks."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from msn.errors import UserError

T = TypeVar("T")

log = logging.getLogger(__name__)

_FIRST_PORT = 15_000
# Variables that launchers set; without a launcher they are left over from another job.
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
SAY_AFTER, GIVE_UP_AFTER = 30.0, 600.0  # seconds of waiting until a message, and until the end
_RANK_AND_WORLD = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"))
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Launch(NamedTuple):
    """Processes started by torchrun or srun, including this one."""

    by: str
    processes: int
    processes_per_node: int

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return self.processes // self.processes_per_node


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """The launch described by the environment; None if neither started this process.

    Raises:
        UserError: if nodes have different numbers of processes.
    """
    if {"TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= environment.keys():
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
            f"{launch.by} started {launch.processes} processes, which is not a multiple of the "
            f"{launch.processes_per_node} on this node: every node must have the same number"
        )
    return launch


def ignore_left_overs(environment: MutableMapping[str, str]) -> None:
    """Remove variables that a launcher set for another process, with a warning.

    Args:
        environment: of this process, which no trainer has started.
    """
    if read_launch(environment) is not None:
        return
    vars(rank_zero_only)["rank"] = 0  # Lightning read the variables on import
    found = [name for name in _OF_LAUNCHERS if name in environment]
    for name in (*found, *_MEETING):  # the trainer finds a free port
        environment.pop(name, None)
    if found:
        log.warning(
            "%s set, but neither torchrun (TORCHELASTIC_RUN_ID) nor srun (SLURM_STEP_ID) has "
            "started this process: not followed",
            ", ".join(found),
        )
    if "SLURM_JOB_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        log.warning(
            "SLURM job %s has %s tasks (SLURM_NTASKS), but srun has not started this process (no "
            "SLURM_STEP_ID): the tasks are not used; srun python ... uses them",
            *(environment["SLURM_JOB_ID"], environment["SLURM_NTASKS"]),
        )


def end_started_processes(trainer: Trainer) -> None:
    """End the processes that the trainer has started, after an error in this one."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGTERM)
        for process in launcher.procs:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:  # waiting in a collective
                process.kill()


def cluster_environment(environment: Mapping[str, str]) -> ClusterEnvironment:
    """Lightning's source of ranks; its own guess follows SLURM's variables even without srun."""
    launch = read_launch(environment)
    if launch is None:
        return LightningEnvironment()
    return TorchElasticEnvironment() if launch.by == "torchrun" else SLURMEnvironment()


@contextlib.contextmanager
def meeting(leave: Callable[[int], None]) -> Iterator[None]:
    """Context in which processes wait for each other, with a message and a time limit.

    Args:
        leave: reports a signal that came meanwhile and ends the process. Called in another thread:
            no Python handler runs while torch waits.

    Raises:
        UserError: if they cannot meet at their address.
    """
    env = os.environ
    place = f"{env.get('MASTER_ADDR', '?')}:{env.get('MASTER_PORT', '?')} (MASTER_ADDR:MASTER_PORT)"
    rank, world = (env.get(name, env.get(slurm, "?")) for name, slurm in _RANK_AND_WORLD)
    who = f"process {rank} of {world} (WORLD_SIZE) waits for the others at {place}"
    ears, mouth = socket.socketpair()
    watcher = threading.Thread(target=_watch, args=(ears, who, leave), daemon=True)
    watcher.start()
    came: list[int] = []
    try:
        with _signals_to(mouth, came):
            yield
    except BaseException as error:
        if came:  # a signal ended torch's wait
            watcher.join()
        if not isinstance(error, dist.DistError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {rank} of {world} does not meet the others at {place}: {reason}"
        ) from None
    finally:
        mouth.close()
        watcher.join()


def _watch(ears: socket.socket, who: str, leave: Callable[[int], None]) -> None:
    """Read signals, one byte each, until the other end is closed or time is up."""
    said = False
    ears.settimeout(SAY_AFTER)
    with ears:
        while True:
            try:
                heard = ears.recv(1)
            except TimeoutError:
                if said:
                    line = f"error: {who} in vain for {GIVE_UP_AFTER:.0f} s"
                    print(line, file=sys.stderr, flush=True)
                    os._exit(2)  # torch's wait cannot be interrupted
                line = f"{who}; it gives up after {GIVE_UP_AFTER:.0f} s"
                print(line, file=sys.stderr, flush=True)
                said = True
                ears.settimeout(GIVE_UP_AFTER - SAY_AFTER)
                continue
            if not heard:
                return
            if heard[0] in _STOPPING:
                leave(heard[0])


@contextlib.contextmanager
def _signals_to(mouth: socket.socket, came: list[int]) -> Iterator[None]:
    """Context in which Python writes numbers of signals to a socket, except ignored ones."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mouth.setblocking(False)
    before = {number: signal.getsignal(number) for number in _STOPPING}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    fd = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd)


def join_launched_processes(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables, which torch's rendezvous reads, from srun's.

    Raises:
        UserError: see `read_launch`.
    """
    launch = read_launch(environment)
    if launch is None or launch.by != "srun" or launch.processes == 1:
        return
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "127.0.0.1"))
    environment.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    # Jobs on the same node rarely have the same last digits.
    job = int(environment.get("SLURM_JOB_ID", "0"))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + job % 10_000))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = str(launch.processes)


def fit_devices(
    launch: Launch | None, devices: int | str | list[int], num_nodes: int
) -> tuple[int | str | list[int], int]:
    """Numbers of devices per node and of nodes that match the launch.

    Args:
        launch: see `read_launch`.
        devices: as set; "auto" takes one per process.
        num_nodes: as set; 1 takes that of the launch.

    Raises:
        UserError: if several nodes are set but there is no launcher.
    """
    if launch is None:
        if num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={num_nodes}: several nodes are started by torchrun or srun"
            )
        return devices, num_nodes
    return launch.processes_per_node if devices == "auto" else devices, launch.nodes


def starts_processes(trainer: Trainer) -> bool:
    """Whether the trainer itself will start further processes by running the command again."""
    strategy = trainer.strategy
    if trainer.world_size == 1 or not isinstance(strategy, ParallelStrategy):
        return False
    environment = strategy.cluster_environment
    return environment is not None and not environment.creates_processes_externally


def agree(
    trainer: Trainer,
    module: LightningModule,
    decide: Callable[[], T],
    leave: Callable[[int], None],
) -> T:
    """Let process 0 decide, and return the answer in all processes.

    Args:
        trainer: of the run; its process group is set up here.
        module: of the run.
        decide: called in process 0 only.
        leave: see `meeting`.

    Raises:
        UserError: in all processes, if `decide` raised it or an OSError.
    """
    if trainer.world_size == 1 or starts_processes(trainer):
        return decide()
    trainer.strategy.connect(module)
    with meeting(leave):
        trainer.strategy.setup_environment()
    answer: tuple[list[T], str | None] = ([], None)
    if trainer.is_global_zero:
        try:
            answer = ([decide()], None)
        except (UserError, OSError) as error:
            answer = ([], str(error))
    values, mistake = trainer.strategy.broadcast(answer)
    if mistake is not None:
        raise UserError(mistake)
    return values[0]
