"""What one save costs 100 steps of the digits recipe, and how long a resume takes.

    python benchmarks/checkpoint_cost.py [--pairs 5]

Runs with and without a save in their middle take turns; the ratio is that of the median times of
steps 2 to 101. A resume is a whole process: start, import, data, checkpoint, one step, save, end.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning.pytorch import Callback, LightningModule, Trainer

from msn.commands import train
from msn.commands.entry import compose

STEPS = 101
ARGUMENTS = [
    "trainer.max_epochs=6",
    "trainer.accelerator=cpu",
    "callbacks.probe.every_n_epochs=null",
]


class Stop(Exception):  # noqa: N818
    """Enough steps."""


class Clock(Callback):
    """Time from the end of the first step to that of the last, and of the longest one."""

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1:
            self.start = time.perf_counter()
        if trainer.global_step == STEPS:
            self.seconds = time.perf_counter() - self.start
            raise Stop


def seconds_of(directory: Path, *, save: bool) -> float:
    """Seconds that steps 2 to 101 take, with a save after step 60 or without."""
    every = 60 if save else 10_000
    config = compose(
        "train",
        [
            *ARGUMENTS,
            f"callbacks.checkpoint.every_n_steps={every}",
            "callbacks.checkpoint.every_n_epochs=1000",
            f"run.dir={directory}",
        ],
    )
    clock, attach = Clock(), train._attach

    def attach_too(config: Any, trainer: Trainer, *rest: Any) -> None:
        attach(config, trainer, *rest)
        trainer.callbacks.append(clock)  # after the one that saves

    train._attach = attach_too
    try:
        train.run(config)
    except Stop:
        pass
    finally:
        train._attach = attach
    return clock.seconds


def resume_seconds(directory: Path) -> float:
    """Wall time of a process that resumes a stopped run, takes one step, saves and ends."""
    root = Path(__file__).parents[1]
    program = [sys.executable, str(root / "tests" / "commands" / "disturbed_train.py"), *ARGUMENTS]
    seconds = 0.0
    for step in (30, 31):
        since = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(root), "DISTURB": f"0:{step}:SIGTERM"}
        done = subprocess.run(
            [*program, f"run.dir={directory}"], env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - since
        assert done.returncode == 75, done.stdout + done.stderr
    assert "resuming from" in done.stdout
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as root:
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * pairs):
            save = number % 2 == 0
            times[save].append(seconds_of(Path(root) / str(number), save=save))
        medians = {save: statistics.median(values) for save, values in times.items()}
        for save, name in {True: "with", False: "without"}.items():
            each = ", ".join(f"{value:.2f}" for value in times[save])
            print(f"100 steps {name} a save: {medians[save]:.2f} s (each: {each})")
        print(f"ratio: {medians[True] / medians[False]:.3f}")
        print(f"resume, whole process: {resume_seconds(Path(root) / 'resume'):.1f} s")


if __name__ == "__main__":
    main()
