"""Checkpoints: written in a thread, kept or removed by rule, resumed exactly.

A resumed run must have the settings and shapes of its checkpoint. Order, views and masks are
functions of the seed; the states of the global generators are kept for users' own code.
"""

import logging
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from msn.errors import UserError
from msn.files import remove_stale, write_checkpoint
from msn.method.distributed import num_processes
from msn.method.optim import TRUNK_KEYS
from msn.method.schedules import warmup_length
from msn.schema import Range, check_ranges, flat
from msn.weights.reading import checkpoints, epoch_and_step, newest_checkpoint

log = logging.getLogger(__name__)


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimiser steps at the end of this batch; batches may be accumulated."""
    return (batch_idx + 1) % accumulated(trainer) == 0 or trainer.is_last_batch


def accumulated(trainer: Trainer) -> int:
    """Batches per optimiser step."""
    return int(vars(trainer)["accumulate_grad_batches"])


class DurableCheckpointIO(CheckpointIO):
    """Write plain-data checkpoints atomically and read them without running their code.

    Lightning's own writer stages in $TMPDIR, which may be another file system, never syncs, and can
    swallow a failed save.

    Attributes:
        on_written: if set, saving returns when the data is copied to the host; a thread writes it
            and then calls this with the path and the error, if there was one.
    """

    def __init__(self) -> None:
        self.on_written: Callable[[Path, Exception | None], None] | None = None
        self._thread: threading.Thread | None = None

    def save_checkpoint(  # noqa: D102
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        self.wait()
        if self.on_written is None:
            write_checkpoint(Path(path), checkpoint)
            return
        arguments = (Path(path), copy_to_host(checkpoint), self.on_written)
        # Not a daemon, so that a normal exit finishes the checkpoint first.
        self._thread = threading.Thread(target=_write_and_tell, args=arguments, name="checkpoint")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def load_checkpoint(  # noqa: D102
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:  # noqa: D102
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:  # noqa: D102
        self.wait()


def _write_and_tell(
    path: Path, checkpoint: dict[str, Any], tell: Callable[[Path, Exception | None], None]
) -> None:
    try:
        write_checkpoint(path, checkpoint)
    except Exception as error:  # it must not be lost with the thread
        tell(path, error)
    else:
        tell(path, None)


def copy_to_host(data: Any) -> Any:
    """Copy nested plain data with all tensors in host memory."""
    copied = _copy_to_host(data)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copied


def _copy_to_host(data: Any) -> Any:
    if isinstance(data, Tensor):
        host = torch.empty_like(data, device="cpu", pin_memory=data.is_cuda)
        return host.copy_(data.detach(), non_blocking=True)
    if isinstance(data, dict):
        return type(data)((key, _copy_to_host(value)) for key, value in data.items())
    if isinstance(data, (list, tuple)):
        return type(data)(_copy_to_host(value) for value in data)
    return data


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Settings of checkpoints; the values live in `configs/callbacks/default.yaml`.

    Raises:
        UserError: a number is out of its range.
    """

    directory: str | Path  # of the files
    every_n_epochs: Annotated[int, Range(1)]  # the last epoch is always saved
    every_n_steps: Annotated[int | None, Range(1)]  # also within epochs; None saves at their end
    keep_last: Annotated[int, Range(1)]  # newest files to keep
    keep_every_n_epochs: Annotated[int | None, Range(1)]  # never deleted; None keeps none for good
    max_failures: Annotated[int, Range(1)]  # failed saves in a row after which the run stops

    def __post_init__(self) -> None:
        check_ranges("callbacks.checkpoint", self)


class PeriodicCheckpoint(Checkpoint):
    """Save at intervals; keep the newest files and optionally every n-th epoch's for good.

    Files are named `epoch-E-step-S.ckpt` after E finished epochs and S steps. A failed save is
    reported and the run goes on; older checkpoints stay. They hold the random states of all
    processes, so that a resumed run goes on exactly.

    Args:
        settings: those of `CheckpointSettings`, by keyword.
    """

    Settings = CheckpointSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = CheckpointSettings(**settings)
        self.directory = Path(self.settings.directory)
        self._failures: list[str] = []
        self._steps_per_epoch = 0
        self._random_states: list[dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        if trainer.is_global_zero:
            remove_stale(self.directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._steps_per_epoch = -(-int(trainer.num_training_batches) // accumulated(trainer))
        if self._random_states is not None:
            restore_random_state(self._random_states, trainer.global_rank)
            self._random_states = None

    def on_save_checkpoint(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["random_states"] = gather_random_states()

    def on_load_checkpoint(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._random_states = checkpoint.get("random_states")

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = ends_step(trainer, batch_idx) and self._is_due(trainer)
        # After an epoch's last step `on_train_epoch_end` saves.
        if due and not trainer.is_last_batch:
            self.save(trainer, finished_epochs=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs
        if self._is_due(trainer) or last or epoch % self.settings.every_n_epochs == 0:
            self.save(trainer, finished_epochs=epoch, wait=last)

    def _is_due(self, trainer: Trainer) -> bool:
        interval = self.settings.every_n_steps
        return interval is not None and trainer.global_step % interval == 0

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._writer(trainer).wait()

    def save(self, trainer: Trainer, *, finished_epochs: int, wait: bool = False) -> Path | None:
        """Save at a step boundary; a collective.

        It only waits for the copy to the host. If the previous file is still being written, nothing
        is saved.

        Args:
            trainer: of the run.
            finished_epochs: number of finished epochs.
            wait: save in any case and wait until the file is on the disk.

        Returns:
            The file, or None if nothing was saved.

        Raises:
            UserError: if `max_failures` saves in a row have failed, or, with `wait`, this one.
        """
        writer = self._writer(trainer)
        writer.on_written = self._on_written
        path = self.directory / f"epoch-{finished_epochs}-step-{trainer.global_step}.ckpt"
        if wait:
            writer.wait()
        if self._agree(trainer, busy=writer.busy, allowed_failures=self.settings.max_failures):
            log.warning("no %s: the file before it is still being written", path.name)
            return None
        trainer.save_checkpoint(path)
        if wait:
            writer.wait()
            self._agree(trainer, busy=False, allowed_failures=1)
        return path

    def _agree(self, trainer: Trainer, *, busy: bool, allowed_failures: int) -> bool:
        """Decide for all processes by what process 0, which writes, knows."""
        decision: tuple[bool, list[str]] = trainer.strategy.broadcast((busy, self._failures))
        busy, failures = decision
        if len(failures) >= allowed_failures:
            raise UserError(failures[-1])
        return busy

    def _on_written(self, path: Path, error: Exception | None) -> None:
        if error is None:
            self._failures.clear()
            self._remove_old(path)
            return
        reason = getattr(error, "strerror", None) or str(error)
        self._failures.append(f"checkpoint {path} could not be written: {reason}")
        newest = newest_checkpoint(self.directory)
        there = f"the newest is {newest.name}" if newest else "there is none yet"
        log.error("%s; training goes on, %s", self._failures[-1], there)

    def _remove_old(self, written: Path) -> None:
        """Remove old files; files newer than the one just written are left over and not counted."""
        removable = [
            path
            for path in checkpoints(self.directory)
            if epoch_and_step(path) <= epoch_and_step(written) and not self._is_for_good(path)
        ]
        for path in removable[: -self.settings.keep_last]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("old checkpoint %s cannot be removed: %s", path, error.strerror)

    def _is_for_good(self, path: Path) -> bool:
        epoch, step = epoch_and_step(path)
        if self.settings.keep_every_n_epochs is None or epoch % self.settings.keep_every_n_epochs:
            return False
        return epoch > 0 and step == epoch * self._steps_per_epoch  # at the end of an epoch

    def _writer(self, trainer: Trainer) -> DurableCheckpointIO:
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, DurableCheckpointIO)
        return writer


def step_of(path: Path) -> int:
    """Optimiser steps of a checkpoint, from its name."""
    return epoch_and_step(path)[1]


def random_state() -> dict[str, Any]:
    """States of Python, NumPy, torch and this process's CUDA device, as plain data."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002  # users may draw from it
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_cuda else None,
    }


def gather_random_states() -> list[dict[str, Any]]:
    """`random_state` of every process, by rank; a collective."""
    state = random_state()
    if num_processes() == 1:
        return [state]
    states: list[dict[str, Any]] = [{} for _ in range(num_processes())]
    dist.all_gather_object(states, state)
    return states


def restore_random_state(states: list[dict[str, Any]], rank: int) -> None:
    """Restore the state of a rank from `gather_random_states`, if as many processes run now."""
    if len(states) != num_processes():
        return
    state = states[rank]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    legacy = (kind, np.array(keys, np.uint32), position, has_gauss, cached)
    np.random.set_state(legacy)  # noqa: NPY002  # see `random_state`
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# Groups of settings of which every value counts, and single settings.
_WHOLE = ("model", "method", "data.views")
_SINGLE = (
    *("seed", "trainer.max_epochs", "trainer.limit_train_batches"),
    *("data.source", "data.hold_out", "data.split_seed", "data.use_labels", "data.image_size"),
    *("data.global_batch_size", "data.backend", "data.group", "trainer.accumulate_grad_batches"),
)


def identity_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's numbers, by their full keys.

    Left out are paths, workers, processes and chunks, which change no number, and precision and
    device, which a run may have to change.

    Args:
        settings: the resolved configuration of a training run.
    """
    pairs = dict(flat("", settings))
    # Optimiser moments of a sharded network are stored in another order.
    sharded = pairs.get("trainer.strategy") == "fsdp2"
    # Keys that older files lack count only if they are not off.
    off: dict[str, Any] = {f"method.{key}": value for key, value in TRUNK_KEYS.items()}
    off |= {"trainer.accumulate_grad_batches": 1, "data.group": None, "method.bf16_stream": False}
    identity = {
        key: value
        for key, value in pairs.items()
        if (key in _SINGLE or any(key.startswith(f"{group}.") for group in _WHOLE))
        and not (key in off and value == off[key])
    }
    if "method.warmup_epochs" in identity:  # older runs have the number
        warmup = identity["method.warmup_epochs"]
        identity["method.warmup_epochs"] = warmup_length(warmup, pairs["trainer.max_epochs"])
    return {**identity, "trainer.strategy": "fsdp2" if sharded else "auto"}


def check_same_run(
    checkpoint: Path,
    identity: Mapping[str, Any],
    shapes: Mapping[str, Tensor],
    *,
    force: bool,
) -> None:
    """Refuse to resume a checkpoint of a run with other settings.

    Args:
        checkpoint: of the run so far.
        identity: `identity_of` the run now.
        shapes: the module's state dict now, for its shapes.
        force: accept all differences under which the weights fit.

    Raises:
        UserError: that names the first key that differs.
    """
    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    before = content.get("msn", {}).get("identity")
    differing = [] if before is None else _differing(before, identity)
    if differing and not force:
        key, then, now = differing[0]
        more = f" ({len(differing)} keys differ)" if len(differing) > 1 else ""
        raise UserError(
            f"cannot resume {checkpoint}: {key} was {then} and is {now} now{more}; "
            "resume.force=true resumes all the same"
        )
    misfit = _misfit(content["state_dict"], shapes)
    if misfit is not None:
        key = next((key for key, *_ in differing if key.startswith(("model", "method"))), "?")
        raise UserError(
            f"cannot resume {checkpoint}: with another {key} its weights do not fit ({misfit}); "
            f"init={checkpoint} starts a new run from them"
        )


def _misfit(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> str | None:
    """The first tensor that is not in both states with the same shape."""
    for name in [*before, *(name for name in now if name not in before)]:
        shapes = [list(state[name].shape) if name in state else None for state in (before, now)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]}, must be {shapes[1]}"
    return None


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = [*before, *(key for key in now if key not in before)]
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]
