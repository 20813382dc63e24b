"""A progress bar for everything slow but training."""

from __future__ import annotations

import sys

from rich import progress as rich
from rich.console import Console


class Progress:
    """A bar that several threads may advance; silent without a terminal and with nothing to do.

    Args:
        title: what is being done.
        total: number of steps; None if unknown.
        show: False is always silent.
    """

    def __init__(self, title: str, total: int | None = None, show: bool = True) -> None:
        text = rich.TextColumn("{task.description}")
        counted = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
        columns = (rich.SpinnerColumn(), text, rich.TimeElapsedColumn())
        visible = show and total != 0 and sys.stderr.isatty()
        self._bar = rich.Progress(
            *(columns if total is None else (text, *counted)),
            console=Console(stderr=True),
            transient=True,
            disable=not visible,
        )
        self._task = self._bar.add_task(title, total=total)

    def advance(self, steps: int = 1, title: str | None = None) -> None:
        """Count some more steps, under another title where one is given."""
        self._bar.update(self._task, advance=steps, description=title)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
