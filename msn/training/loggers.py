"""Loggers: metrics.csv of every run, and optionally Weights & Biases, TensorBoard and MLflow.

Nothing is sent anywhere without `logger=wandb`. WANDB_MODE (offline, disabled) and wandb's other
variables are honoured.
"""

import contextlib
import csv
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from msn.errors import UserError
from msn.evaluation.sets import table_key
from msn.files import read_rows, write_atomically, write_bytes
from msn.training.judge import VERDICTS_FILE, read_verdicts


class MetricsCSV(Logger):
    """One row per logged step; a resumed run drops the rows that it repeats.

    Lightning's CSVLogger deletes the file of a resumed run. If the disk is full or read-only,
    training goes on, and the rows are written as soon as possible.

    Args:
        path: the file; new columns are added to its header.
    """

    def __init__(self, *, path: str | Path) -> None:
        super().__init__()
        self._path = Path(path)
        self._columns: list[str] = []
        # Rows that are not in the file yet, and the last row, which its step may extend.
        self._rows: list[dict[str, float | None]] = []
        self._start: int | None = None  # byte in the file where the first of them begins
        self._fails = False

    @property
    def name(self) -> str:  # noqa: D102
        return "csv"

    @property
    def version(self) -> str:  # noqa: D102
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the resolved configuration is saved as config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row, or extend the last row if its step is the same."""
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1].update(metrics)
        else:
            self._rows.append({"step": step, **metrics})
        try:
            self._write()
        except OSError as error:
            if not self._fails:
                log.error(
                    "%s cannot be written: %s; training goes on, rows are kept until it can",
                    *(self._path, error.strerror),
                )
            self._fails = True
        else:
            self._fails = False

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Drop rows of steps after `step`, which the run will repeat."""
        if self._path.is_file():
            rows = [row for row in read_rows(self._path) if int(row["step"]) <= step]
            self._rewrite(list(rows[0]) if rows else ["step"], rows)

    def _write(self) -> None:
        if self._start is None:
            there = self._path.is_file()
            self._columns = _header(self._path) if there else []
            self._start = self._path.stat().st_size if there else 0
        new = [name for row in self._rows for name in row if name not in self._columns]
        if new:
            self._add_columns(list(dict.fromkeys(new)))
        with self._path.open("r+", newline="") as file:
            file.seek(self._start)
            file.truncate()
            writer = csv.DictWriter(file, self._columns)
            writer.writerows(self._rows[:-1])
            start = file.tell()
            writer.writerow(self._rows[-1])
        self._rows, self._start = self._rows[-1:], start

    def _add_columns(self, names: list[str]) -> None:
        if self._path.is_file():
            os.truncate(self._path, self._start or 0)
        columns = [*self._columns, *names]
        self._rewrite(columns, read_rows(self._path))
        self._columns, self._start = columns, self._path.stat().st_size

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self._path, lambda file: file.write(text.getvalue().encode()))


def _header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


log = logging.getLogger(__name__)

ID_FILE = "wandb-id.txt"
# Files that `artifacts` uploads at the end of a run.
ARTIFACTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "results": ("config.yaml", "metrics.csv", "verdicts.csv", "lowshot.json", "report.html"),
    "backbone": ("config.yaml", "backbone.safetensors"),
}
_ROW = ("backbone", "classifier", "labels", "splits", "top1_mean", "top1_std", "lambda")


class Table(NamedTuple):
    """A table of a run directory."""

    columns: list[str]
    rows: list[list[Any]]


def tables(directory: Path) -> dict[str, Table]:
    """The verdicts and the low-shot table of a run directory, if they exist."""
    found = {}
    verdicts, lowshot = directory / VERDICTS_FILE, directory / "lowshot.json"
    if kept := read_verdicts(verdicts):
        found["verdicts"] = Table(list(kept[0]), [list(row.values()) for row in kept])
    if rows := _lowshot_rows(lowshot):
        found["lowshot"] = Table(list(_ROW), [[row[name] for name in _ROW] for row in rows])
    return found


def _lowshot_rows(path: Path) -> list[dict[str, Any]]:
    return _as_utf8(json.loads(path.read_text()))["rows"] if path.is_file() else []


def _as_utf8(data: Any) -> Any:
    """Plain data with `?` for bytes of names that are not UTF-8, which no logger takes."""
    return json.loads(json.dumps(data, ensure_ascii=False).encode(errors="replace"))


def _check_utf8(logger: str, save_dir: str) -> None:
    if _as_utf8(save_dir) != save_dir:
        raise UserError(
            f"logger={logger}: cannot write into {save_dir}, whose name is not UTF-8: choose "
            "another run.dir"
        )


class WandbRun(WandbLogger):
    """A run of Weights & Biases that goes on after a resume.

    Its id is kept in the run directory; offline, `wandb sync` joins parts of one id.

    Args:
        save_dir: the run directory, where wandb keeps its files.
        project: of wandb.
        name: of the run; None takes the last two parts of the run directory.
        artifacts: one or several of `ARTIFACTS`, separated by commas.
        job_type: of wandb; None for a training.

    Raises:
        UserError: if `artifacts` is something else, or `save_dir` is not UTF-8.
    """

    def __init__(
        self,
        *,
        save_dir: str,
        project: str,
        name: str | None,
        artifacts: str,
        job_type: str | None = None,
    ) -> None:
        self._wanted = [part.strip() for part in artifacts.split(",")]
        for part in self._wanted:
            if part not in ARTIFACTS:
                raise UserError(
                    f"logger.wandb.artifacts must be among {', '.join(ARTIFACTS)}, got {part}"
                )
        _check_utf8("wandb", save_dir)
        self._directory = Path(save_dir)
        absolute = self._directory.absolute()
        name = name or f"{absolute.parent.name}/{absolute.name}"
        super().__init__(save_dir=save_dir, project=project, name=name, job_type=job_type)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb, begun or resumed on first use.

        Raises:
            UserError: if wandb has no login or does not answer.
        """
        if self._experiment is None:
            file = self._directory / ID_FILE
            known = file.read_text().strip() if file.is_file() else None
            self._wandb_init["id"] = known
            folder = self._directory / "wandb"
            is_new = not folder.exists()
            try:
                run = super().experiment
            except Exception as error:  # login, network or settings: wandb raises many classes
                if is_new:
                    shutil.rmtree(folder, ignore_errors=True)
                if isinstance(error, UnicodeEncodeError):  # of sys.argv
                    reason = "takes no command line with a name that is not UTF-8"
                else:
                    reason = f"{' '.join(str(error).split())}; WANDB_MODE=offline needs no login"
                raise UserError(f"logger=wandb: {reason}") from None
            if known is None:
                write_bytes(file, f"{run.id}\n".encode())
        return super().experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Give wandb the settings."""
        super().log_hyperparams(_as_utf8(params))

    @rank_zero_only
    def log_results(self) -> None:
        """Log tables, top-1 of each low-shot row as summary, curve and artifacts; end the run."""
        import wandb

        run, lowshot = self.experiment, self._directory / "lowshot.json"
        for name, table in tables(self._directory).items():
            run.log({name: wandb.Table(columns=[*table.columns], data=table.rows)})
        for row in _lowshot_rows(lowshot):
            parts = ["lowshot", row["backbone"], *filter(None, table_key(row))]
            run.summary["/".join(parts)] = row["top1_mean"]
        if (curve := lowshot.with_suffix(".png")).is_file():
            run.log({"lowshot_curve": wandb.Image(str(curve))})
        for kind in self._wanted:
            files = [self._directory / file for file in ARTIFACTS[kind]]
            if present := [file for file in files if file.is_file()]:
                artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
                for file in present:
                    artifact.add_file(str(file))
                run.log_artifact(artifact)
        run.finish()

    @rank_zero_only
    def close_after_error(self, kind: type[BaseException] | None, *error: object) -> None:
        """Close a run that failed; for `ExitStack.push`."""
        if kind is not None:
            self.close(failed=True)

    @rank_zero_only
    def close(self, *, failed: bool) -> None:
        """End the run of wandb."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))


class TensorBoardRun(TensorBoardLogger):
    """TensorBoard's files in RUN/tensorboard; a resumed run hides the steps that it repeats.

    If they cannot be written, an error is logged and training goes on.

    Args:
        save_dir: the run directory.
        resume_step: step of the resumed checkpoint; None for a new run.

    Raises:
        UserError: if `save_dir` is not UTF-8.
    """

    def __init__(self, *, save_dir: str, resume_step: int | None) -> None:
        _check_utf8("tensorboard", save_dir)
        self._directory = Path(save_dir)
        self._is_lost = False
        purge: dict[str, Any] = {} if resume_step is None else {"purge_step": resume_step + 1}
        super().__init__(save_dir, name="", version="tensorboard", **purge)

    @rank_zero_only
    def log_hyperparams(
        self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Show the settings as text; TensorBoard's "hparams" would need a score per run."""
        text = json.dumps(params, indent=2)
        with self._may_fail():
            self.experiment.add_text("config", "\n".join(f"    {row}" for row in text.splitlines()))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the figures of a step."""
        with self._may_fail():
            super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush and close the files."""
        with self._may_fail():
            super().finalize(status)

    @rank_zero_only
    def save(self) -> None:
        """Flush, without Lightning's hparams.yaml."""
        with self._may_fail():
            self.experiment.flush()

    @rank_zero_only
    def log_results(self) -> None:
        """Show the tables of the run directory as text."""
        for name, table in tables(self._directory).items():
            head = [table.columns, ["---"] * len(table.columns)]
            rows = [f"| {' | '.join(map(str, row))} |" for row in [*head, *table.rows]]
            with self._may_fail():
                self.experiment.add_text(name, "\n".join(rows))
        self.save()

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # its writer repeats the first error
            if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
                raise
            if not self._is_lost:
                where, why = self._directory / "tensorboard", error.__cause__ or error
                log.error("%s cannot be written: %s; training goes on without", where, why)
            self._is_lost = True
