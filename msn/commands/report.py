"""`python -m msn report runs=[RUN,...]`: one page about a run, or about several side by side."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msn.commands.entry import one_line, to_plain
from msn.commands.eval_lowshot import choose_device
from msn.errors import UserError
from msn.files import write_bytes
from msn.reporting.record import CONFIG_FILE, RunRecord, read_record
from msn.reporting.report import build_report
from msn.schema import whole_number

REPORT_FILE = "report.html"
# Groups in the configuration of a pretraining run.
_GROUPS = ("data", "method", "model", "module", "run", "trainer")


def run(config: DictConfig) -> None:
    """Build the page of one run, or of several side by side.

    Raises:
        UserError: if a setting is wrong or a directory holds no run.
    """
    settings = to_plain(config)
    runs = settings["runs"]
    paths = [Path(str(path)) for path in (runs if isinstance(runs, list) else [runs])]
    if not paths:
        raise UserError("runs=[]: name at least one run directory")
    images = whole_number("images", settings["images"], 0)
    records = [open_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    out = settings["out"]
    out = (paths[0] if len(paths) == 1 else Path()) / REPORT_FILE if out is None else Path(str(out))
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"out={out}: name a file in an existing directory")
    write_report(records, out, images=images, device=choose_device(settings["device"]))
    print(f"report: {out}")


def write_report(records: list[RunRecord], out: Path, *, images: int, device: torch.device) -> None:
    """Build the page and write it.

    Raises:
        OSError: if it cannot be written.
    """
    page = build_report(records, images=images, device=device)
    # File names need not be UTF-8, but the page is.
    write_bytes(out, page.encode(errors="replace"))


def open_run(path: Path, name: str) -> RunRecord:
    """Read a run directory.

    Raises:
        UserError: if it does not hold a pretraining run, or a damaged one.
    """
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"runs={path}: is not a run directory: it holds no {CONFIG_FILE}")
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(path / CONFIG_FILE), resolve=True)
    except (YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"{path / CONFIG_FILE}: cannot be read ({one_line(error)})") from None
    groups = settings if isinstance(settings, dict) else {}
    if not all(isinstance(groups.get(name), dict) for name in _GROUPS):
        raise UserError(f"runs={path}: is not a pretraining run (python train.py)")
    return read_record(path, settings, name)


def _names(paths: list[Path]) -> list[str]:
    """The last part of each path, with its parent if it is a number or two are equal."""
    absolute = [path.absolute() for path in paths]
    names = [p.name if not p.name.isdigit() else f"{p.parent.name}/{p.name}" for p in absolute]
    if max(Counter(names).values()) > 1:
        names = [f"{p.parent.name}/{p.name}" for p in absolute]
    if max(Counter(names).values()) > 1:
        return [str(path) for path in paths]
    return names
