"""Preemption: on a signal all processes agree, save a checkpoint and exit."""

import logging
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from msn.method.distributed import num_processes, process_index
from msn.training.checkpointing import PeriodicCheckpoint, ends_step
from msn.training.trainer import callbacks_of, override

log = logging.getLogger(__name__)

EXIT_CODE = 75  # of an interrupted run that is saved; the same command resumes it

# The larger value wins if processes get different signals. SIGUSR1, and submitit's SIGUSR2, also
# ask for a requeue.
_SIGNALS = {
    **{signal.SIGTERM: 1, signal.SIGINT: 1, signal.SIGHUP: 1},
    **{signal.SIGUSR1: 2, signal.SIGUSR2: 2},
}
# Launchers and clusters send the same signal several times (to the group, by srun, by the agent).
_SAME_SIGNAL_SECONDS = 0.5


class Preempted(BaseException):
    """The run was asked to stop. Not an `Exception`, so that `except Exception` does not catch it.

    Attributes:
        checkpoint: that was saved; None before the first step and after the last one.
        requeue: whether the signal asks for a requeue.
        trained: the run directory, if all steps were done.
    """

    trained: Path | None = None

    def __init__(self, checkpoint: Path | None, *, requeue: bool) -> None:
        super().__init__()
        self.checkpoint, self.requeue = checkpoint, requeue


class Preemption(Callback):
    """On a signal save at the next step boundary, in all processes, and stop.

    Signals are SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1 and SIGUSR2, unless they were ignored
    (nohup). During the fit the handler only sets a flag; before and after it there is nothing to
    save, and it raises `Preempted`. Flags are exchanged over gloo during the next step, so that
    nothing waits. A second signal ends the process at once; the last checkpoint stays whole.

    Args:
        requeue: under SLURM, SIGUSR1 and SIGUSR2 also requeue the job.

    Attributes:
        received: 0, or what a signal asked for, see `_SIGNALS`.
    """

    def __init__(self, *, requeue: bool) -> None:
        self.requeue = requeue
        self.received = 0
        self._at = 0.0
        self._is_fitting = self._is_own = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._exchange: tuple[Any, torch.Tensor] | None = None

    def install(self) -> None:
        """Install the handlers, before the fit, so that no signal is lost meanwhile."""
        self._process = os.getpid()
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Restore the previous handlers."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        # Lightning's handlers save and call collectives inside the handler, and its loop broadcasts
        # a flag, and so waits for the device, in each step.
        override(trainer._signal_connector, "register_signal_handlers", lambda: None)
        override(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)
        self._is_own = not self._before
        if self._is_own:
            self.install()
        self._is_fitting = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._is_fitting = False
        if self._is_own:
            self.uninstall()

    def asked_by(self, number: int) -> Preempted:
        """The exception for a signal that comes before the run has begun."""
        return Preempted(None, requeue=self._requeues(_SIGNALS[signal.Signals(number)]))

    def check(self) -> None:
        """Raise `Preempted` if a signal came after the last step."""
        if self.received:
            raise Preempted(None, requeue=self._requeues(self.received))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if num_processes() > 1:
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        asked = self._agreed()
        if asked and trainer.is_last_batch:
            self.received = asked  # `on_train_epoch_end` saves
        elif asked:
            self._save_and_stop(trainer, asked, finished_epochs=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        asked = self._agreed(last=True)
        if asked:
            self._save_and_stop(trainer, asked, finished_epochs=trainer.current_epoch + 1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker, which inherits the handler
        now = time.monotonic()
        if self.received and now - self._at > _SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        is_first = not self.received
        if is_first:
            self._at = now
        self.received = max(self.received, _SIGNALS[signal.Signals(number)])
        if is_first and not self._is_fitting:
            self.check()
        if is_first and process_index() == 0:  # not print, which may be interrupted itself
            os.write(2, b"\ninterrupted: saving after this step; once more ends at once\n")

    def _agreed(self, *, last: bool = False) -> int:
        """The request that all processes know; with several, as of the previous step."""
        if self._group is None:
            return self.received
        agreed = self._finish_exchange()
        flag = torch.tensor([max(self.received, agreed)])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = (work, flag)
        return self._finish_exchange() if last else agreed

    def _finish_exchange(self) -> int:
        if self._exchange is None:
            return 0
        (work, flag), self._exchange = self._exchange, None
        work.wait()
        return int(flag)

    def _save_and_stop(self, trainer: Trainer, asked: int, *, finished_epochs: int) -> None:
        (saver,) = callbacks_of(trainer, PeriodicCheckpoint)
        path = saver.save(trainer, finished_epochs=finished_epochs, wait=True)
        assert path is not None
        raise Preempted(path, requeue=self._requeues(asked))

    def _requeues(self, asked: int) -> bool:
        return self.requeue and asked == _SIGNALS[signal.SIGUSR1]


def requeue_slurm_job() -> str | None:
    """Ask SLURM to run this job again; returns a line for the log, None outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"[0-9_]+", job):
        return f"not requeued: SLURM calls this job {job!r}"
    if shutil.which("scontrol") is None:
        return f"job {job} not requeued: there is no scontrol here"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        return f"job {job} not requeued: {done.stderr.strip() or done.returncode}"
    return f"job {job} requeued"
