"""`python -m msn rank checkpoint=[...] data.root=DIR`: which checkpoint is best, without labels."""

import json
import math
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


def run(config: DictConfig) -> dict[str, Measures]:
    """Measure every checkpoint on the same unlabelled images and print the table.

    Returns:
        The figures by the names of the checkpoints.

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
    found = {}
    for backbone in opened:
        with in_one_line(lambda: less_memory("features.batch_size", features.batch_size)):
            found[backbone.name] = measure(backbone, images, features, runtime)
    if settings["json"] is not None:
        _write(Path(str(settings["json"])), found, settings)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(_table(found, len(images.chosen)))
    return found


def expand(checkpoint: str | list[str]) -> list[str]:
    """A run directory as all its checkpoints, `name/epoch`; everything else as it is.

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


def _table(found: dict[str, Measures], images: int) -> Table:
    """Figures with the place of each checkpoint by each measure."""
    places = {
        key: sorted((value.goodness()[key] for value in found.values()), reverse=True)
        for key in _TITLES
    }
    table = Table(
        title=f"{images} images without labels; (place) among {len(found)}",
        title_justify="left",
        caption="No measure orders checkpoints of different settings reliably: a few labels and "
        "eval_lowshot.py do (benchmarks/ranking.md).",
        caption_justify="left",
    )
    table.add_column("checkpoint", no_wrap=True)
    for title in _TITLES.values():
        table.add_column(title, justify="right")
    for name, value in found.items():
        cells = []
        for key, good in value.goodness().items():
            place = 1 + places[key].index(good) if not math.isnan(good) else len(found)
            cells.append(f"{getattr(value, key):.2f} ({place})")
        table.add_row(Text(printable(name)), *cells)
    return table


def _write(path: Path, found: dict[str, Measures], settings: dict[str, Any]) -> None:
    """The figures as JSON; those that are not finite are null."""
    rows = [
        {
            "backbone": name,
            **{k: v if math.isfinite(v) else None for k, v in value._asdict().items()},
        }
        for name, value in found.items()
    ]
    text = json.dumps({"rows": rows, "config": settings}, indent=1, allow_nan=False, default=str)
    write_bytes(path, f"{text}\n".encode())
