"""A progress bar that several threads may advance, shown where a person is looking."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Counts images or label sets; silent without a terminal, and where there is nothing to do.

    Args:
        title: what is being done.
        total: how many are to come.
        show: False is always silent.
    """

    def __init__(self, title: str, total: int, show: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        visible = show and total > 0 and sys.stderr.isatty()
        self._bar = RichProgress(
            *columns, console=Console(stderr=True), transient=True, disable=not visible
        )
        self._task = self._bar.add_task(title, total=total)

    def advance(self, number: int) -> None:
        """Count some more."""
        self._bar.advance(self._task, number)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
