"""A progress bar for everything slow but training."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Any

from rich import progress as rich
from rich.console import Console


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


class Held(io.StringIO):
    """Keeps what is printed to itself; bars of a notebook go to the stream behind it."""

    def __init__(self, behind: Any) -> None:
        super().__init__()
        self.behind = behind


class Progress:
    """A bar that several threads may advance, in a terminal or notebook; else it is silent.

    Args:
        title: what is being done.
        total: number of steps; None if unknown.
        show: False is always silent.
    """

    def __init__(self, title: str, total: int | None = None, show: bool = True) -> None:
        self._notebook: Any = None
        if show and total != 0 and in_notebook():
            tqdm = import_module("tqdm").tqdm
            shown = getattr(sys.stdout, "behind", sys.stdout)
            self._notebook = tqdm(desc=title, total=total, file=shown, leave=False, ncols=100)
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
        if self._notebook is not None:
            if title:
                self._notebook.set_description(title, refresh=False)
            self._notebook.update(steps)
        self._bar.update(self._task, advance=steps, description=title)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if self._notebook is not None:
            self._notebook.close()
