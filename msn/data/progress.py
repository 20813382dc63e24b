"""A bar for what takes long and has no training's progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


@contextlib.contextmanager
def progress_bar(text: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Show that something goes on, on a terminal alone; the yielded function takes one step.

    Args:
        text: what is going on.
        total: steps until the end; None where nobody knows.
    """
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [BarColumn()] if total is not None else []
    progress = Progress(
        *columns,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with progress:
        task = progress.add_task(text, total=total)
        yield lambda text: progress.update(task, description=text, advance=1)
