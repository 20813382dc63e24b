"""metrics.csv: every run's record, appended to, also across resumes."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsCSV(Logger):
    """One row a logged step; a resumed run drops rows from its checkpoint's step on and goes on.

    Lightning's CSVLogger deletes the file of the run that it resumes.

    Args:
        path: the file; columns that appear later are added to its header.
    """

    def __init__(self, *, path: str | Path) -> None:
        super().__init__()
        self._path = Path(path)
        self._columns: list[str] = []
        self._last: dict[str, float | None] = {}
        self._last_start = 0  # where the last row begins in the file, bytes

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
        if not self._columns and self._path.exists():
            self._columns = _header(self._path)
        joins = bool(self._last) and self._last["step"] == step
        row = {**self._last, **metrics} if joins else {"step": step, **metrics}
        new = [name for name in row if name not in self._columns]
        if joins:
            self._truncate(self._last_start)
        if new:
            self._add_columns(new)
        with self._path.open("a", newline="") as file:
            self._last, self._last_start = row, file.seek(0, os.SEEK_END)
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Forget rows of steps after `step`, which the run is about to take again."""
        if self._path.exists():
            rows = [row for row in read_metrics(self._path) if int(row["step"]) <= step]
            self._rewrite(_header(self._path), rows)

    def _truncate(self, size: int) -> None:
        with self._path.open("r+") as file:
            file.truncate(size)

    def _add_columns(self, names: list[str]) -> None:
        rows = read_metrics(self._path) if self._path.exists() else []
        self._columns = [*self._columns, *names]
        self._rewrite(self._columns, rows)

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self._path)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv; empty fields are metrics that were not logged in that step."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])
