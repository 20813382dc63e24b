"""`python -m msn rank checkpoint=[...] data.root=DIR`: compare checkpoints without labels."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from msn.commands.entry import to_plain
from msn.commands.eval_lowshot import cache_directory, check_seed, choose_device, without_views
from msn.commands.suggest_labels import images_of
from msn.data.datamodule import resolve_workers
from msn.data.pools import PoolSettings, build_pools
from msn.data.sources import ArraySource
from msn.data.workers import in_one_line, less_memory
from msn.errors import UserError
from msn.evaluation.backbones import open_backbones
from msn.evaluation.features import FeatureSettings, Runtime
from msn.evaluation.ranking import Crops, Measures, measure
from msn.evaluation.sets import printable
from msn.evaluation.table import in_markdown
from msn.files import write_bytes
from msn.images.depth import check_depth, trained_depth
from msn.schema import make, whole_number
from msn.weights.reading import checkpoints

_TITLES = {
    "rankme": "RankMe, more",
    "lidar": "LiDAR, more",
    "alpha": "alpha-ReQ, near 1",
    "dimension": "dimension, less",
}

_NOTE = (
    "No measure orders checkpoints of different settings reliably: a few labels and "
    "eval_lowshot.py do (benchmarks/ranking.md)."
)


def run(config: DictConfig) -> list[dict[str, Any]]:
    """Measure every checkpoint on the same unlabelled images and print the table.

    Returns:
        For each checkpoint `backbone`, its name, and the fields of `Measures`.

    Raises:
        UserError: if a setting, path or file is wrong, or there are too few images.
    """
    settings = to_plain(without_views(config))
    for key, least in (("images", 32), ("views", 2)):
        whole_number(key, settings[key], least)
    features = make("features", settings["features"], FeatureSettings, complete=True)
    opened = open_backbones(
        expand(settings["checkpoint"]),
        image_size=features.image_size,
        num_heads=settings["model"]["num_heads"],
        key=settings["init_key"],
        family=settings["init_family"],
    )
    for backbone in opened:
        backbone.check(features)
    data = images_of(settings["data"])
    abouts = [backbone.about for backbone in opened]
    data["depth"] = trained_depth(check_depth(data["depth"]), abouts)
    pool = build_pools(make("data", data, PoolSettings)).train
    images = Crops(
        pool, images=settings["images"], views=settings["views"], seed=check_seed(settings["seed"])
    )
    workers = resolve_workers(data["num_workers"], in_memory=isinstance(pool.source, ArraySource))
    device = choose_device(settings["device"])
    runtime = Runtime((device,), workers, cache_directory(settings["cache_dir"]))
    rows: list[dict[str, Any]] = []
    for backbone in opened:
        with in_one_line(lambda: less_memory("features.batch_size", features.batch_size)):
            found = measure(backbone, images, features, runtime)
        rows.append({"backbone": backbone.name, **found._asdict()})
    if settings["json"] is not None:
        _write(Path(str(settings["json"])), rows, settings)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    title = f"{len(images.pool)} images without labels; (place) among {len(rows)}"
    console.print(table_of(rows, title))
    return rows


def expand(checkpoint: str | list[str]) -> list[str]:
    """Replace each run directory by all its checkpoints, named `name-FILE`.

    Raises:
        UserError: nothing is named.
    """
    entries = [checkpoint] if isinstance(checkpoint, str) else list(checkpoint)
    found = []
    for entry in map(str, entries):
        name, colon, path = entry.partition(":")
        whole = Path(entry).exists() or not colon
        run_directory = Path(entry if whole else path)
        files = checkpoints(run_directory / "checkpoints")
        prefix = run_directory.name if whole else name
        found += [f"{prefix}-{file.stem}:{file}" for file in files] or [entry]
    if not found:
        raise UserError("checkpoint=[]: give a run directory or [name:path,name:path]")
    return found


def table_of(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The measures, with the place of each checkpoint by each measure."""
    table = Table(title=title, title_justify="left", caption=_NOTE, caption_justify="left")
    table.add_column("checkpoint", no_wrap=True)
    for heading in _TITLES.values():
        table.add_column(heading, justify="right")
    for name, *cells in _lines(rows):
        table.add_row(Text(name), *cells)
    return table


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same in markdown."""
    lines = [["checkpoint", *_TITLES.values()], ["---"] * (1 + len(_TITLES)), *_lines(rows)]
    return "\n".join(["| " + " | ".join(map(in_markdown, line)) + " |" for line in lines])


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Name, then each figure with its place."""
    good = [Measures(*(row[key] for key in _TITLES)).goodness() for row in rows]
    places = {key: sorted((one[key] for one in good), reverse=True) for key in _TITLES}
    found = []
    for row, one in zip(rows, good, strict=True):
        line = [printable(row["backbone"])]
        for key, value in one.items():
            place = 1 + places[key].index(value) if not math.isnan(value) else len(rows)
            line.append(f"{row[key]:.2f} ({place})")
        found.append(line)
    return found


def _write(path: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """The figures as JSON; those that are not finite are null."""
    finite = [
        {k: v if k not in _TITLES or math.isfinite(v) else None for k, v in row.items()}
        for row in rows
    ]
    text = json.dumps({"rows": finite, "config": settings}, indent=1, allow_nan=False, default=str)
    write_bytes(path, f"{text}\n".encode())
