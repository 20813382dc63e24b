"""`python -m msn bench what=NAME`: measure a part of the product on this machine."""

import json
import os
from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from msn.commands.entry import to_plain
from msn.errors import UserError
from msn.files import write_bytes


def run(config: DictConfig) -> None:
    """Measure, print a table, and write its rows where `json` says.

    Raises:
        UserError: if a setting or a path is wrong.
    """
    settings = to_plain(config)
    path = None if settings["json"] is None else Path(str(settings["json"]))
    if path is not None:
        _check_writable(path)  # told before minutes of measuring, not after
    rows = import_module(f"msn.commands.bench_{settings['what']}").run(settings, Console())
    if path is not None:
        write_bytes(path, (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())


def _check_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"json={path}: cannot be written: name a file in a directory of yours")
