"""metrics.csv: every run's record, appended to, also across resumes."""

import csv
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from msn.files import read_rows, write_atomically

log = logging.getLogger(__name__)


class MetricsCSV(Logger):
    """One row per logged step; a resumed run drops rows from its checkpoint's step on and goes on.

    Lightning's CSVLogger deletes the file of the run that it resumes. Where the disk is full or
    read-only, training goes on, and the rows are written as soon as the disk takes them.

    Args:
        path: the file; columns that appear later are added to its header.
    """

    def __init__(self, *, path: str | Path) -> None:
        super().__init__()
        self._path = Path(path)
        self._columns: list[str] = []
        # Rows that are not in the file yet; the last row stays, for what is logged in its step.
        self._rows: list[dict[str, float | None]] = []
        self._start: int | None = None  # where the first of them begins in the file, bytes
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
        """Append a row; what is logged in the last row's step joins it."""
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
        """Forget rows of steps after `step`, which the run is about to take again."""
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
