"""`eval_lowshot.py suite=...`: several data sets, each kept as soon as it is done."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msn.commands.entry import MISTAKES, config_directory, one_line, options
from msn.data.dataset import LabelledImages
from msn.errors import UserError
from msn.evaluation.sets import Result, Row
from msn.evaluation.suite import write_suite
from msn.evaluation.table import write_results

TABLE_FILE = "lowshot.json"
# What a data set says itself; other `data.*` keys of the command hold for all.
_OWN = ("source", "root", "val_root", "image_size")
# Settings that change no figure.
_ELSEWHERE = ("run", "device", "cache_dir", "resume", "logger", "suite", "init_key")


class Suite(NamedTuple):
    """Data sets by their names, and what measures one of them."""

    sets: Mapping[str, dict[str, Any]]
    """Settings `data.*` of each."""
    measure: Callable[..., tuple[list[Result], LabelledImages]]
    """From settings `data.*`, and `shared` as below, to all results and the held-out images."""
    weights: Mapping[str, str]
    """Digest of each backbone."""
    settings: Mapping[str, Any]
    """Of the command."""


def read_suite(suite: str, data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings `data.*` of every data set of a suite.

    Args:
        suite: a YAML file of names with keys of `data`, or a name of `configs/suite`.
        data: settings `data.*` of the command; relative `root` and `val_root` of the suite start
            at its `root`.

    Raises:
        UserError: there is no such suite, or it cannot be read.
    """
    path = Path(suite)
    if not path.is_file():
        path = config_directory() / "suite" / f"{suite}.yaml"
        if suite not in options("suite"):
            names = ", ".join(options("suite"))
            raise UserError(f"suite={suite}: no such file, and no name of configs/suite ({names})")
    try:
        entries: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"suite={suite}: cannot be read as YAML ({one_line(error)})") from None
    if not entries or not isinstance(entries, dict):
        raise UserError(
            f"suite={suite}: must be names, each with keys of data such as source, root"
        )
    found = {}
    for name, entry in entries.items():
        where = f"suite={suite}: {name}"
        if not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise UserError(f"{where}: a name has letters, digits, _, - and . alone")
        if not isinstance(entry, dict) or "source" not in entry:
            raise UserError(f"{where}: give it the keys of data, source at least, got {entry!r}")
        unknown = sorted(str(key) for key in entry if key not in data or str(key).startswith("_"))
        if unknown:
            raise UserError(f"{where}: data has no key {unknown[0]}")
        found[str(name)] = {**data, **dict.fromkeys(_OWN), **entry}
        for key in ("root", "val_root"):
            if entry.get(key) is not None:
                start, end = data["root"] or "", os.path.expanduser(str(entry[key]))
                found[str(name)][key] = os.path.normpath(os.path.join(start, end))
    return found


def measure_suite(suite: Suite, directory: Path | None, *, shared: bool) -> None:
    """Measure every data set that is not there yet, then write and print the table of all.

    Args:
        suite: data sets and what measures them.
        directory: run directory, with a folder for each data set; None in all processes but the
            first.
        shared: whether several processes make this call together.

    Raises:
        UserError: names the data sets that could not be measured, after all others are written.
    """
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for number, (name, data) in enumerate(suite.sets.items(), start=1):
        settings = {**suite.settings, "data": data}
        kept = None if directory is None else _kept(directory / name, settings, suite.weights)
        if _agreed(kept is not None, shared):
            rows += kept or []
            continue
        if directory is not None:
            print(f"{name} ({number} of {len(suite.sets)})", file=sys.stderr)
        try:
            results, held_out = suite.measure(dict(data), shared=shared)
            if directory is not None:
                write_results(directory / name / TABLE_FILE, results, settings, held_out)
                rows += _kept(directory / name, settings, suite.weights) or []
        except MISTAKES as error:
            failed[name] = one_line(error)
            if directory is not None:
                print(f"error: {name}: {failed[name]}", file=sys.stderr)
    if directory is None:
        return
    write_suite(directory / TABLE_FILE, rows, failed, suite.settings)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(suite.sets)} data sets could not be measured: "
            f"{', '.join(failed)}; the same command with run.dir={directory} tries these again"
        )


def _kept(place: Path, settings: Mapping[str, Any], weights: Mapping[str, str]) -> list[Row] | None:
    """Rows of a finished data set, if settings and weights are the same; else None."""
    try:
        content = json.loads((place / TABLE_FILE).read_bytes())
        rows, config = content["rows"], content["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    own = {row["backbone"]: row["weights"] for row in rows if "weights" in row}
    if own != dict(weights) or _figures(config) != _figures(settings):
        return None
    name = place.name
    return [
        {"data": name, **row, "head": None if row["head"] is None else f"{name}/{row['head']}"}
        for row in rows
    ]


def _figures(settings: Mapping[str, Any]) -> Any:
    """The settings that change a figure, as they come back from a JSON file."""
    own = {key: value for key, value in settings.items() if key not in _ELSEWHERE}
    own["data"] = {key: value for key, value in own["data"].items() if key != "num_workers"}
    return json.loads(json.dumps(own, default=str))


def _agreed(kept: bool, shared: bool) -> bool:
    """What the first process says, in all of them."""
    answer: list[Any] = [kept]
    if shared:
        dist.broadcast_object_list(answer)
    return bool(answer[0])
