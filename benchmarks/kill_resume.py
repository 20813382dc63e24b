"""Stop training runs by random signals at random moments, resume each until it is done, compare.

    python benchmarks/kill_resume.py [--runs 20] [--kills 2] [--seed 0]

Signals are SIGKILL, SIGINT (Ctrl-C), SIGTERM and SIGHUP, the first as often as the others together.
Every run is a process of its own that writes a checkpoint after every step, so that kills hit
writes too. Weights, target, prototypes, optimiser, schedules, random states, the position in the
data and all else in the last checkpoint must be bit-equal to those of a run that was never
disturbed, and so must the losses in metrics.csv. Exit code 1 if one differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from omegaconf import DictConfig

from msn.commands import train
from msn.commands.entry import compose
from msn.commands.run_directory import read_status
from msn.files import read_rows
from msn.training.monitors import matrix_rate
from msn.weights.reading import newest_checkpoint

ARGUMENTS = [
    *("model.embed_dim=48", "model.depth=2", "method.num_prototypes=32"),
    *("data.global_batch_size=16", "method.warmup_epochs=0.5"),
    *("trainer.max_epochs=2", "trainer.limit_train_batches=6", "trainer.accelerator=cpu"),
    *("callbacks.checkpoint.every_n_epochs=1", "callbacks.checkpoint.every_n_steps=1"),
    *("trainer.log_every_n_steps=1", "callbacks.probe.every_n_epochs=null"),
]
SIGNALS = [*[signal.SIGKILL] * 3, signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
CLOCKS = {"/callbacks/Monitors/seconds"}  # the hours of a run may differ


def differing(first: Any, second: Any, where: str = "") -> list[str]:
    """Paths below which two nested structures are not bit-equal."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [d for k in first for d in differing(first[k], second[k], f"{where}/{k}")]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            return [where]
        pairs = zip(first, second, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differing(a, b, f"{where}/{i}")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if torch.equal(first, second) else [where]
    return [] if first == second else [where]


def start(config: DictConfig, directory: Path) -> int:
    """A copy of this process that trains; everything is imported already."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it
    with (directory.parent / f"{directory.name}.log").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = 1
        try:
            config.run.dir = str(directory)
            train.run(config)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)


def kill(config: DictConfig, directory: Path, delay: float, number: signal.Signals) -> str | None:
    """Stop a run after some seconds; says what stood there then, None if it was done before."""
    child = start(config, directory)
    until = time.monotonic() + delay
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        time.sleep(0.001)
    os.kill(child, number)
    os.waitpid(child, 0)
    newest = newest_checkpoint(directory / "checkpoints")
    writing = any((directory / "checkpoints").glob(".*.tmp"))
    where = newest.stem if newest else "no file"
    return f"{number.name} at {where}{' while writing' if writing else ''}"


def finish(config: DictConfig, directory: Path) -> dict[str, Any]:
    """Let a run end and give what its last checkpoint holds."""
    if read_status(directory).get("status") != "finished":
        status = os.waitstatus_to_exitcode(os.waitpid(start(config, directory), 0)[1])
        if status:
            sys.exit(directory.with_suffix(".log").read_text())
    newest = newest_checkpoint(directory / "checkpoints")
    assert newest is not None
    rows = read_rows(directory / "metrics.csv")
    losses = [(row["step"], row["train/loss"]) for row in rows]
    return {"metrics.csv": losses, **torch.load(newest, weights_only=True)}


def main() -> None:
    """Kill, resume, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]")
    for name, default in {"runs": 20, "kills": 2, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.set_num_threads(1)
    matrix_rate(torch.device("cpu"), torch.float32)  # known before the copies are made
    config = compose("train", ARGUMENTS)
    train.finish = lambda settings, directory, *_: directory.write_status("finished")
    failed = writes = kills = 0
    with tempfile.TemporaryDirectory() as root:
        since = time.monotonic()
        straight = finish(config, Path(root) / "straight")
        seconds = time.monotonic() - since
        for number in range(options.runs):
            directory = Path(root) / f"run{number}"
            done = [
                kill(config, directory, draw.uniform(0.1, seconds), draw.choice(SIGNALS))
                for _ in range(options.kills)
            ]
            found = set(differing(straight, finish(config, directory))) - CLOCKS
            killed = [what for what in done if what is not None]
            kills, writes = kills + len(killed), writes + sum("writing" in k for k in killed)
            failed += bool(found)
            verdict = f"DIFFERS in {sorted(found)[:5]}" if found else "bit-equal"
            print(
                f"run {number}: {'; '.join(killed)}: {verdict}",
                flush=True,
            )
    print(
        f"{options.runs - failed} of {options.runs} runs bit-equal to the undisturbed one after "
        f"{kills} signals, {writes} of them while a checkpoint was written"
    )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
