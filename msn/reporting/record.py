"""What a run directory says of its run: the figures from which a report is made."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msn.errors import UserError
from msn.files import read_rows

CONFIG_FILE = "config.yaml"
VERDICT_TEXT = ("verdict", "line")


@dataclass(frozen=True)
class RunRecord:
    """One run, read from its directory."""

    name: str
    """What the report calls it."""
    path: Path
    settings: Mapping[str, Any]
    """The resolved configuration."""
    config_text: str
    """The same as it stands in config.yaml."""
    status: Mapping[str, Any] = field(default_factory=dict)
    """run.json: status, and `facts` on machine, images and versions."""
    metrics: Sequence[Mapping[str, float]] = ()
    """Rows of metrics.csv; a row has what was logged in its step."""
    verdicts: Sequence[Mapping[str, str]] = ()
    """Rows of verdicts.csv: step, epoch, verdict, line."""
    lowshot: Mapping[str, Any] | None = None
    """lowshot.json."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Machine, images and versions, as far as the run kept them."""
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
    """Read a run directory; what is missing (the run may be unfinished) stays empty.

    Args:
        path: the directory.
        settings: its config.yaml, parsed and resolved.
        name: what the report calls the run.

    Raises:
        UserError: if a file of it is damaged.
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
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return found
