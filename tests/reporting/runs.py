"""A run directory as training leaves it, made in a second: real weights, made-up figures."""

import csv
import json
import math
from pathlib import Path

import torch
from omegaconf import OmegaConf

from msn.commands.entry import build, compose
from msn.reporting.curves import PANELS
from tests.commands.conftest import TINY

EPOCHS, STEPS = 8, 20


def make_run(directory: Path, *overrides: str) -> Path:
    """Config, checkpoint, metrics, verdicts and table of a digits run."""
    config = compose("train", [*TINY, f"trainer.max_epochs={EPOCHS}", *overrides])
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    torch.manual_seed(config.seed)
    module = build(config, "module")
    checkpoint = {"state_dict": module.state_dict(), "epoch": EPOCHS}
    module.checkpoint_info.update(data={"source": "digits"}, init=None)
    module._trainer = type("Trainer", (), {"current_epoch": EPOCHS})()
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, directory / "checkpoints" / f"epoch-{EPOCHS}-step-160.ckpt")
    names = [name for panel in PANELS for name in panel.series] + ["speed/hours"]
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", *names])
        for step in range(10, EPOCHS * STEPS + 1, 10):
            values = [math.exp(-step / 100) + i for i in range(len(names))]
            writer.writerow([step, (step - 1) // STEPS, *values])
    with (directory / "verdicts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "verdict", "line"])
        for epoch in range(1, EPOCHS + 1):
            kind = "warming up" if epoch < 3 else "collapsed" if epoch < 6 else "learning"
            writer.writerow([STEPS * epoch, epoch, kind, f"{kind}: <line> of epoch {epoch}"])
    (directory / "lowshot.json").write_text(json.dumps({"rows": list(_rows())}))
    facts = {"device": "CPU", "processes": 1, "precision": "32-true", "training_images": 1297}
    facts |= {"steps_per_epoch": STEPS, "parameters": 12345, "versions": {"torch": "2.15.0"}}
    (directory / "run.json").write_text(json.dumps({"status": "finished", "facts": facts}))
    return directory


def _rows():
    for backbone in ("msn", "random"):
        for labels in (1, 2, 5):
            yield {
                "backbone": backbone,
                "classifier": "logistic",
                "labels": str(labels),
                "labelled_images": 10 * labels,
                "splits": 3,
                "top1_mean": 0.5 + labels / 20,
                "top1_std": 0.03,
                "interval": [0.4, 0.8],
                "paper": None,
            }
