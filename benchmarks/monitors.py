"""The share of a training step that monitors, verdict and probe cost.

    python benchmarks/monitors.py [experiment=digits] [epochs=2] [steps=40] [json=FILE]

Further keys of train.py: overrides=[data.root=DIR,model=vit_s16].
"""

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.script import run_script
from msn.commands.entry import build, compose
from msn.schema import whole_number
from msn.training.cost import synchronise
from msn.training.judge import Judge
from msn.training.module import MSNModule
from msn.training.monitors import Monitors
from msn.training.probe import Probe

_WARM_UP = 5  # steps that are not counted: first kernels, first allocations


def run(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Train for a short while with everything that watches, and time each part of it.

    Args:
        settings: experiment and overrides of train.py; epochs, and steps per epoch.
        console: where the table is shown.

    Returns:
        Rows with name, milliseconds per step (or per time), and share of a step.

    Raises:
        UserError: if a setting is wrong.
    """
    for name, least in {"epochs": 1, "steps": _WARM_UP + 1}.items():
        whole_number(name, settings[name], least)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    found = _train(settings)
    step = found.step_ms()
    monitors = found.monitors_ms()
    rows = [
        {"name": "step", "milliseconds": step, "share": 1.0},
        {"name": "monitors, a step", "milliseconds": monitors, "share": monitors / step},
        {"name": "verdict, an epoch", "milliseconds": 1000 * statistics.median(found.verdict)},
        {"name": "probe, a time", "milliseconds": 1000 * statistics.median(found.probe)},
    ]
    table = Table("part", "milliseconds", "share of a step", title=f"on {found.device}")
    for row in rows:
        share = f"{row['share']:.2%}" if "share" in row else ""
        table.add_row(str(row["name"]), f"{row['milliseconds']:.3f}", share)
    console.print(table)
    return rows


class _Watch:
    """Seconds that parts took, and when steps ended."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.ended: list[float] = []
        self.monitors: list[float] = []
        self.verdict: list[float] = []
        self.probe: list[float] = []

    def time(self, kind: list[float], function: Callable[..., None]) -> Callable[..., None]:
        """The function, timed with the device idle before and after."""

        def timed(*arguments: Any) -> None:
            synchronise(self.device)
            start = time.perf_counter()
            function(*arguments)
            synchronise(self.device)
            kind.append(time.perf_counter() - start)

        return timed

    def step_ms(self) -> float:
        """Mean of a step without what watches, waiting for data included."""
        total = self.ended[-1] - self.ended[0] - sum(self.monitors)
        return 1000 * total / (len(self.ended) - 1)

    def monitors_ms(self) -> float:
        """Mean a step, rows included."""
        return 1000 * sum(self.monitors) / (len(self.ended) - 1)


class _Ends(Callback):
    """Marks the ends of steps of the last epoch, after the warm-up."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.device = pl_module.device

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        synchronise(self.watch.device)
        if trainer.current_epoch + 1 == trainer.max_epochs and batch_idx >= _WARM_UP - 1:
            if not self.watch.ended:
                self.watch.monitors.clear()
            self.watch.ended.append(time.perf_counter())


def _train(settings: dict[str, Any]) -> _Watch:
    config = compose(
        "train",
        [
            f"experiment={settings['experiment']}",
            f"trainer.max_epochs={settings['epochs']}",
            f"trainer.limit_train_batches={settings['steps']}",
            *map(str, settings["overrides"]),
        ],
    )
    seed_everything(0, verbose=False)
    data, module = build(config, "data"), build(config, "module")
    assert isinstance(module, MSNModule)
    watch = _Watch()
    with tempfile.TemporaryDirectory() as directory:
        monitors, probe = build(config, "callbacks.monitors"), build(config, "callbacks.probe")
        judge = build(config, "callbacks.verdict", directory=directory)
        _time_parts(watch, monitors, judge, probe)
        trainer: Trainer = build(
            config,
            "trainer",
            callbacks=[monitors, probe, judge, _Ends(watch)],
            loggers=[],
            run_dir=directory,
        )
        steps = min(len(data.sampler(rank=0, world_size=1)), settings["steps"])
        module.plan_schedule(epochs=settings["epochs"], steps_per_epoch=steps)
        trainer.fit(module, datamodule=data)
    return watch


def _time_parts(watch: _Watch, monitors: Monitors, judge: Judge, probe: Probe) -> None:
    for hook in ("on_train_batch_start", "on_train_batch_end", "_keep_features"):
        setattr(monitors, hook, watch.time(watch.monitors, getattr(monitors, hook)))
    judge.on_train_epoch_end = watch.time(watch.verdict, judge.on_train_epoch_end)
    probe.on_train_epoch_end = watch.time(watch.probe, probe.on_train_epoch_end)


def main() -> None:
    """Run with the settings of the command line."""
    run_script(run, {"experiment": "digits", "overrides": [], "epochs": 2, "steps": 40})


if __name__ == "__main__":
    main()
