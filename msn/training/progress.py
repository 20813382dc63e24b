"""Progress for a person: a bar in a terminal or notebook, a line now and then in a log file."""

import sys
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from msn.training.monitors import Monitors

_SHOWN = {
    "train/loss": "loss",
    "collapse/prototypes_used": "prototypes used",
    "speed/images_per_s": "images/s",
}
SECONDS_BETWEEN_LINES = 5.0


class Bar(RichProgressBar):
    """Rich bar that shows loss, prototypes used and images/s."""

    def get_metrics(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return {**_shown_metrics(trainer)}


class Lines(Callback):
    """A line at the end of an epoch, at most one every few seconds; the last epoch always."""

    def __init__(self) -> None:
        self._last = 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        epoch = trainer.current_epoch + 1
        recent = time.monotonic() - self._last < SECONDS_BETWEEN_LINES
        if not trainer.is_global_zero or (recent and epoch != trainer.max_epochs):
            return
        self._last = time.monotonic()
        shown = "  ".join(f"{name} {value}" for name, value in _shown_metrics(trainer).items())
        print(f"epoch {epoch}/{trainer.max_epochs}  {shown}", flush=True)


def build_progress() -> Callback:
    """The progress display that fits where the output goes."""
    if "ipykernel" in sys.modules:
        return TQDMProgressBar()
    return Bar(leave=False) if sys.stdout.isatty() else Lines()


def _shown_metrics(trainer: Trainer) -> dict[str, str]:
    latest = next((c.latest for c in trainer.callbacks if isinstance(c, Monitors)), {})  # type: ignore[attr-defined]
    return {label: f"{latest[name]:.4g}" for name, label in _SHOWN.items() if name in latest}
