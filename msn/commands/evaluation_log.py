"""A low-shot table in Weights & Biases, when it is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msn.evaluation.rows import Result, table_key


def log_to_wandb(directory: Path, results: Sequence[Result], settings: dict[str, Any]) -> None:
    """Log the rows as a table and each accuracy as a summary value; WANDB_MODE is honoured.

    Args:
        directory: the run directory; wandb keeps its files below it.
        results: rows of the table.
        settings: plain configuration.
    """
    import wandb  # only where it is asked for: importing it takes a second

    rows = [result.row for result in results]
    names = ("backbone", "classifier", "labels", "splits", "top1_mean", "top1_std", "lambda")
    logger = settings["logger"]["wandb"]
    run = wandb.init(
        project=logger["project"],
        name=logger["name"],
        job_type="eval_lowshot",
        dir=str(directory),
        config=settings,
    )
    data = [[row[name] for name in names] for row in rows]
    run.log({"lowshot": wandb.Table(columns=list(names), data=data)})
    for row in rows:
        parts = [row["backbone"], *table_key(row)]
        run.summary["/".join(["lowshot", *filter(None, parts)])] = row["top1_mean"]
    picture = directory / "lowshot.png"
    if picture.is_file():
        run.log({"lowshot_curve": wandb.Image(str(picture))})
    run.finish()
