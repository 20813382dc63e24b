"""Progress display: a bar in a terminal or notebook, a line per epoch in a log file."""

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from msn.progress import in_notebook
from msn.training.judge import Judge
from msn.training.monitors import Monitors
from msn.training.probe import Probe
from msn.training.trainer import callbacks_of

_SHOWN = {
    "train/loss": "loss",
    "collapse/prototypes_used": "prototypes used",
    "speed/images_per_s": "images/s",
}


class Lines(Callback):
    """A line at the end of an epoch: figures and verdict."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.is_global_zero:
            shown = "  ".join(f"{name} {value}" for name, value in _figures(trainer).items())
            print(f"{_epoch(trainer)}  {shown}  | {_verdict(trainer)}", flush=True)


class Bar(RichProgressBar):
    """Rich bar in a terminal; the verdict of each epoch stays above it."""

    def get_metrics(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return {**_figures(trainer)}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.is_global_zero:  # rich prints it above its bar
            print(f"{_epoch(trainer)}  {_verdict(trainer)}")


class NotebookBar(TQDMProgressBar):
    """tqdm's widget in a notebook; the verdict of each epoch stays above it."""

    def get_metrics(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return {**_figures(trainer)}

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:  # noqa: D102
        super().on_train_epoch_end(trainer, *args)
        if trainer.is_global_zero:
            self.print(f"{_epoch(trainer)}  {_verdict(trainer)}")


def build_progress() -> Callback:
    """The progress display for a notebook, a terminal or a log file."""
    if in_notebook():
        return NotebookBar()
    return Bar(leave=False) if sys.stdout.isatty() else Lines()


def _epoch(trainer: Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"


def _figures(trainer: Trainer) -> dict[str, str]:
    latest: dict[str, float] = {}
    for monitors in callbacks_of(trainer, Monitors):
        latest |= monitors.latest
    return {label: f"{latest[name]:.4g}" for name, label in _SHOWN.items() if name in latest}


def _verdict(trainer: Trainer) -> str:
    lines = [part.latest.line for part in callbacks_of(trainer, Judge) if part.latest is not None]
    for probe in callbacks_of(trainer, Probe):
        if probe.latest_epoch == trainer.current_epoch and "probe/knn_top1" in probe.latest:
            lines.append(f"10-NN {probe.latest['probe/knn_top1']:.1%}")
    return "; ".join(lines)
