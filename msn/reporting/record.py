"""Read a run directory: settings, metrics, verdicts and the low-shot table for a report."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msn.files import read_rows
from msn.weights.reading import read_json

CONFIG_FILE = "config.yaml"
VERDICT_TEXT = ("verdict", "line")


@dataclass(frozen=True)
class RunRecord:
    """One run, read from its directory."""

    name: str
    """Its name in the report."""
    path: Path
    settings: Mapping[str, Any]
    """The resolved configuration."""
    config_text: str
    """The text of config.yaml."""
    status: Mapping[str, Any] = field(default_factory=dict)
    """run.json: status, and `facts` on machine, images and versions."""
    metrics: Sequence[Mapping[str, float]] = ()
    """Rows of metrics.csv; a row holds what was logged in its step."""
    verdicts: Sequence[Mapping[str, str]] = ()
    """Rows of verdicts.csv: step, epoch, verdict, line."""
    lowshot: Mapping[str, Any] | None = None
    """lowshot.json."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Machine, images and versions, as far as run.json has them."""
        return self.status.get("facts", {})

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps in which a figure was logged, and its values; both empty if it never was."""
        found = [(row["step"], row[name]) for row in self.metrics if name in row]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, name: str) -> float | None:
        """The last value of a figure, None if it was never logged."""
        values = self.series(name)[1]
        return values[-1] if values else None


def read_record(path: Path, settings: Mapping[str, Any], name: str) -> RunRecord:
    """Read a run directory; files that are missing, as in an unfinished run, leave fields empty.

    Args:
        path: the directory.
        settings: its config.yaml, parsed and resolved.
        name: of the run in the report.

    Raises:
        UserError: if one of its files is damaged.
    """
    return RunRecord(
        name=name,
        path=path,
        settings=settings,
        config_text=(path / CONFIG_FILE).read_text(encoding="utf-8", errors="replace"),
        status=_read_json(path / "run.json") or {},
        metrics=[_numbers(row) for row in read_rows(path / "metrics.csv")],
        verdicts=list(filter(_is_verdict, read_rows(path / "verdicts.csv", text=VERDICT_TEXT))),
        lowshot=_read_json(path / "lowshot.json"),
    )


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    """The fields that are finite numbers."""
    found = {}
    for name, text in row.items():
        with suppress(TypeError, ValueError):  # empty, or damaged
            found[name] = float(text)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _is_verdict(row: Mapping[str, str]) -> bool:
    return all(row.get(name) for name in ("verdict", "line")) and (row.get("epoch") or "").isdigit()


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
