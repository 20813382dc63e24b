"""Checkpoints that survive: written beside their place, made durable, then put in place at once."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from msn.errors import UserError

_NAME = re.compile(r"epoch-(\d+)-step-(\d+)\.ckpt")


class DurableCheckpointIO(CheckpointIO):
    """Write plain-data checkpoints atomically and read them without running their code.

    Lightning's own writer stages in $TMPDIR, where another file system makes the move a copy, never
    syncs, and can swallow a failed save.
    """

    def save_checkpoint(  # noqa: D102
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(  # noqa: D102
        self,
        path: str | Path,
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        location = map_location or "cpu"
        return torch.load(path, map_location=location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:  # noqa: D102
        Path(path).unlink(missing_ok=True)


def write_durably(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file so that after a crash the old or the new one stands there, whole.

    Args:
        path: where the file shall stand; its directory exists.
        write: writes the content to the binary file that it is given.

    Raises:
        OSError: whatever the system said; the old file is untouched then.
    """
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class PeriodicCheckpoint(Checkpoint):
    """Save at epoch ends, keep the newest and, if wished, every n-th for good.

    Args:
        directory: where files go, named `epoch-E-step-S.ckpt` after E finished epochs.
        every_n_epochs: >= 1; the last epoch is always saved.
        keep_last: newest files to keep, >= 1.
        keep_every_n_epochs: epochs whose files are never deleted, >= 1; None keeps none for good.

    Raises:
        UserError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        directory: str | Path,
        every_n_epochs: int,
        keep_last: int,
        keep_every_n_epochs: int | None,
    ) -> None:
        super().__init__()
        numbers = {
            "every_n_epochs": every_n_epochs,
            "keep_last": keep_last,
            "keep_every_n_epochs": keep_every_n_epochs or 1,
        }
        for name, value in numbers.items():
            if value < 1:
                raise UserError(f"callbacks.checkpoint.{name} must be >= 1, got {value}")
        self.directory = Path(directory)
        self.every_n_epochs, self.keep_last = every_n_epochs, keep_last
        self.keep_every_n_epochs = keep_every_n_epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs and epoch != trainer.max_epochs:
            return
        trainer.save_checkpoint(self.directory / f"epoch-{epoch}-step-{trainer.global_step}.ckpt")
        if trainer.is_global_zero:
            self._remove_old()

    def _remove_old(self) -> None:
        kept_for_good = self.keep_every_n_epochs
        removable = [
            path
            for path in checkpoints(self.directory)
            if kept_for_good is None or _epoch_and_step(path)[0] % kept_for_good
        ]
        for path in removable[: -self.keep_last]:
            path.unlink(missing_ok=True)


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoint files of a directory, oldest first."""
    if not directory.is_dir():
        return []
    files = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(files, key=_epoch_and_step)


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint file of a directory, None if there is none."""
    files = checkpoints(directory)
    return files[-1] if files else None


def step_of(path: Path) -> int:
    """Optimiser steps that a checkpoint's name says it has seen."""
    return _epoch_and_step(path)[1]


def _epoch_and_step(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])
