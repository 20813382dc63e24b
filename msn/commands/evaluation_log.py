"""A low-shot table in Weights & Biases, when it is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msn.evaluation.sets import Result, table_key
from msn.training.loggers import wandb_refusal

_COLUMNS = ("backbone", "classifier", "labels", "splits", "top1_mean", "top1_std", "lambda")


class WandbLog:
    """A run of Weights & Biases; WANDB_MODE is honoured. As a context it ends with an error.

    Args:
        directory: where wandb keeps its files, in a folder of its own.
        settings: plain configuration.

    Raises:
        UserError: wandb knows no login or does not answer.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        import wandb  # only where it is asked for: importing it takes a second

        logger = settings["logger"]["wandb"]
        try:
            self._run = wandb.init(
                project=logger["project"],
                name=logger["name"],
                job_type="eval_lowshot",
                dir=str(directory),
                config=settings,
            )
        except Exception as error:  # of login, network or settings: wandb has many classes
            raise wandb_refusal(error) from None

    def __enter__(self) -> "WandbLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """After an error the run is closed: the next one of a sweep begins one of its own."""
        if kind is not None:
            self._run.finish(exit_code=1)

    def write(self, directory: Path, results: Sequence[Result]) -> None:
        """Log the rows as a table, each accuracy as a summary value, and the curve.

        Args:
            directory: the run directory.
            results: rows of the table.
        """
        import wandb

        rows = [result.row for result in results]
        data = [[row[name] for name in _COLUMNS] for row in rows]
        self._run.log({"lowshot": wandb.Table(columns=list(_COLUMNS), data=data)})
        for row in rows:
            parts = [row["backbone"], *table_key(row)]
            self._run.summary["/".join(["lowshot", *filter(None, parts)])] = row["top1_mean"]
        picture = directory / "lowshot.png"
        if picture.is_file():
            self._run.log({"lowshot_curve": wandb.Image(str(picture))})
        self._run.finish()
