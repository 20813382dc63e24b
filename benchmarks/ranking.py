"""How well do the label-free measures of `python -m msn rank` order checkpoints by accuracy?

python benchmarks/ranking.py runs=DIR train=true            # the grid of small runs, on digits
python benchmarks/ranking.py runs=DIR                       # every checkpoint below DIR
python benchmarks/ranking.py runs=DIR root=IMAGES           # likewise on a folder of images
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))

import msn
from benchmarks.script import run_script
from msn.commands.entry import compose
from msn.commands.rank import expand, run
from msn.errors import UserError
from msn.evaluation.ranking import Measures
from msn.weights.reading import checkpoints

_SMALL = {
    "model.embed_dim": 48,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.patch_size": 8,
    "method.head.hidden_dim": 96,
    "method.head.output_dim": 48,
    "data.views.focal_views": 2,
    "data.use_labels": False,
    "data.num_workers": 0,
    "trainer.accelerator": "cpu",
    "trainer.limit_train_batches": 14,
    "callbacks.probe.every_n_epochs": None,
    "report": False,
}
# What each run changes; `rate` multiplies the learning rate.
_GRID: dict[str, dict[str, Any]] = {
    "base": {},
    "rate_low": {"rate": 0.1},
    "rate_high": {"rate": 5},
    "rate_wild": {"rate": 30},
    "prototypes_16": {"method.num_prototypes": 16},
    "prototypes_256": {"method.num_prototypes": 256},
    "collapsed": {"method.use_sinkhorn": False, "method.me_max_weight": 0.0},
    "drop_80": {"method.patch_drop": 0.8},
}


def main() -> None:
    """Train the grid, or measure what stands below `runs`."""
    run_script(_job, {"runs": None, "root": None, "train": False, "images": 500, "views": 8})


def _job(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    if settings["runs"] is None:
        raise UserError("runs=DIR must be given")
    runs = Path(settings["runs"])
    if settings["train"]:
        _train(runs, settings["root"])
        return []
    found = sorted(path.parent for path in runs.rglob("checkpoints") if checkpoints(path))
    if not found:
        raise UserError(f"runs={runs}: there is no checkpoint below it")
    named = expand([f"{'-'.join(path.relative_to(runs).parts)}:{path}" for path in found])
    rows = _measured(named, settings)
    for name in Measures._fields:
        good = np.array([row["goodness"][name] for row in rows])
        top1 = np.array([row["top1"] for row in rows])
        lost = top1.max() - top1[np.nanargmax(good)]
        order = spearmanr(np.nan_to_num(good, nan=-np.inf), top1).statistic
        console.print(f"{name:10} Spearman {order:+.2f}, lost {100 * lost:.1f} points")
    console.print(
        f"{len(rows)} checkpoints, 5-shot {100 * top1.min():.1f} to {100 * top1.max():.1f}, "
        f"any at random loses {100 * (top1.max() - top1.mean()):.1f} points"
    )
    return rows


def _train(out: Path, root: str | None) -> None:
    """Runs of under a minute, with three checkpoints each."""
    rate, epochs = (4e-3, 12) if root is None else (3e-3, 9)
    for name, change in _GRID.items():
        factor = change.get("rate", 1)
        own = {key: value for key, value in change.items() if key != "rate"}
        msn.pretrain(
            root,
            out / name,
            experiment="digits" if root is None else "small_images",
            **_SMALL,
            **own,
            **{
                "method.lr": rate * factor,
                "method.start_lr": rate * factor / 5,
                "trainer.max_epochs": epochs,
                "callbacks.checkpoint.every_n_epochs": epochs // 3,
                "callbacks.checkpoint.keep_every_n_epochs": epochs // 3,
            },
        )


def _measured(named: list[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Label-free measures and 5-shot top-1 of each checkpoint."""
    root = settings["root"]
    table = msn.evaluate(
        dict(entry.split(":", 1) for entry in named),
        root,
        baselines=[],
        **{"protocol.shots": [5], "protocol.knn_neighbours": None, "data.num_workers": 0,
           "protocol.logistic.lambd_grid": None},
    )  # fmt: skip
    top1 = {row["backbone"]: row["top1_mean"] for row in table}
    overrides = [f"checkpoint=[{','.join(named)}]", "data.num_workers=0"]
    overrides += [f"{key}={settings[key]}" for key in ("images", "views")]
    overrides += [] if root is None else [f"data.root={root}"]
    measured = run(compose("rank", overrides))
    return [
        {"backbone": name, "top1": top1[name], **value._asdict(), "goodness": value.goodness()}
        for name, value in measured.items()
    ]


if __name__ == "__main__":
    main()
