"""`python -m msn bench what=step|views|all`: measure training on this machine, and its limits.

Comparisons with other programs are scripts in `benchmarks/`, run from a checkout.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from msn.commands.adaptation import choose_prototypes, follow_init
from msn.commands.entry import to_plain
from msn.commands.plan import IMAGENET_IMAGES
from msn.commands.step import bench_step, case_of
from msn.data.batched_views import make_batched_views
from msn.data.dataset import ImageBatch, Subset, TrainingSet
from msn.data.sampler import BatchKey
from msn.data.sources import FileSource, folder_source
from msn.data.tables import StringTable
from msn.data.views import ViewSettings, view_settings
from msn.errors import UserError
from msn.files import write_bytes
from msn.images.decode import decode, full_size
from msn.training.cost import synchronise
from msn.training.strategy import keep_freed_memory

CPU = torch.device("cpu")
_ROUNDS = 5  # for the median; every round measures everything
_SHORT = 0.1  # of the longest time; shorter ways are measured more than once per round
_BATCH = 120  # images per batch, and images of a folder that are measured
_ADVICE = {
    "decoding": "more cores or workers, or smaller files (msn make_shards).",
    "views": "fewer or smaller views, or a device that makes them faster.",
    "step": "data keep up; a faster device or a smaller model helps, more workers do not.",
}

Rows = list[dict[str, Any]]
Way = Callable[[], object]


def run(config: DictConfig) -> None:
    """Measure, print tables, and write their rows where `json` says.

    Raises:
        UserError: if a setting or a path is wrong.
    """
    if to_plain(config).get("init") is not None:
        said = [*follow_init(config), *choose_prototypes(config, IMAGENET_IMAGES)]
        print(*said, sep="\n", end="\n" if said else "")
    settings = to_plain(config)
    job = {"step": bench_step, "views": bench_views, "all": bench_all}[settings["what"]]
    keep_rows(job, settings)


def keep_rows(job: Callable[[dict[str, Any], Console], Rows], settings: dict[str, Any]) -> None:
    """Run a measurement and write its rows to the setting `json`, if it is given.

    Raises:
        UserError: if the file cannot be written; raised before anything is measured.
    """
    path = None if settings["json"] is None else Path(str(settings["json"]))
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UserError(
            f"json={path}: cannot be written: name a file in a directory that you may write to"
        )
    rows = job(settings, Console())
    if path is not None:
        write_bytes(path, (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())


def bench_all(settings: dict[str, Any], console: Console) -> Rows:
    """Measure views from files and the step, and name the bottleneck of a training here.

    Args:
        settings: of `bench_step`, and `images` as of `bench_views`.
        console: where the tables are shown.

    Returns:
        The rows of both, and {"name": "training", "images_per_s", "bottleneck", "limits": images/s
        of each part alone}.

    Raises:
        UserError: a setting is wrong, or the folder holds no readable image.
    """
    case_of(settings)  # finds mistakes before minutes of measuring
    photos(settings["images"])
    step = bench_step(settings, console)  # first: its peak counts what the process took before
    data = bench_views({"images": settings["images"], "views": settings["data"]["views"]}, console)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {row["name"]: row for row in data}
    training = combine(
        worker=rows["worker"]["milliseconds"] / 1000,
        views=rows[f"batched_views_{where}"]["views_milliseconds"] / 1000,
        step=1 / step[0]["images_per_s"],
        cores=cores or 1,
        on_cuda=where == "cuda",
    )
    limits = ", ".join(f"{name} {rate:.1f}" for name, rate in training["limits"].items())
    console.print(
        f"Images/s of each part alone on {cores} cores: {limits}.\n"
        f"A training here reaches about {training['images_per_s']:.1f} images/s; the bottleneck is "
        f"{training['bottleneck']}: {_ADVICE[training['bottleneck']]}"
    )
    return [*data, *step, training]


def combine(
    *, worker: float, views: float, step: float, cores: int, on_cuda: bool
) -> dict[str, Any]:
    """The row `training`: the rate of a training whose parts share a machine.

    Args:
        worker: seconds per image to read and decode, on one core.
        views: seconds per image to make views, on the GPU or on one core.
        step: seconds per image of the step.
        cores: number that workers may use.
        on_cuda: True if workers decode while the GPU makes views and steps in turn; on a CPU all
            three share the cores.
    """
    decoding = worker / cores
    if not on_cuda:
        views /= cores
    total = max(decoding, views + step) if on_cuda else decoding + views + step
    seconds = {"decoding": decoding, "views": views, "step": step}
    return {
        "name": "training",
        "images_per_s": 1 / total,
        "bottleneck": max(seconds, key=lambda name: seconds[name]),
        "limits": {name: 1 / s for name, s in seconds.items() if s > 0},
    }


def bench_views(settings: dict[str, Any], console: Console) -> Rows:
    """Measure the ways from files to views on one core, and on the GPU if there is one.

    Args:
        settings: `images` (a folder; None takes scikit-learn's two photographs) and `views`.
        console: where the table is shown.

    Returns:
        The rows of `view_rows`.

    Raises:
        UserError: a setting is wrong, or the folder holds no readable image.
    """
    views, source = view_settings(settings["views"]), photos(settings["images"])
    return view_rows(ways_to_views(source, views), source, views, console)


def photos(folder: str | None) -> FileSource:
    """Evenly spaced images of a folder; without one, two photographs repeated.

    Raises:
        UserError: the folder holds no image.
    """
    root = str(Path(sklearn.__file__).parent / "datasets" / "images") if folder is None else folder
    source = folder_source(root, key="images", use_labels=False)
    chosen = np.linspace(0, len(source) - 1, min(_BATCH, len(source))).astype(int)
    names = [source.name(int(i)) for i in chosen]
    if folder is None:
        names = names * (_BATCH // len(names))
    paths = StringTable.from_strings(names)
    return FileSource(where=root, root=source.root, paths=paths, labels=None, classes=[])


def read_batch(source: FileSource, views: ViewSettings, *, reduce: bool = True) -> ImageBatch:
    """All images of a source as one batch of a worker."""
    return TrainingSet(Subset(source), views, seed=0, reduce=reduce)[
        BatchKey(0, 0, np.arange(len(source)))
    ]


def ways_to_views(source: FileSource, views: ViewSettings) -> dict[str, Way]:
    """The ways to measure; each reads every image once, so that times are comparable.

    Raises:
        UserError: an image cannot be read.
    """
    for bad in read_batch(source, views).bad:
        raise UserError(f"images={source.where}: {bad.path} cannot be read ({bad.reason})")

    def decode_all() -> None:
        for i in range(len(source)):
            decode(Path(source.root, source.name(i)).read_bytes(), full_size)

    def on_cuda() -> None:
        batch = read_batch(source, views)
        pixels = batch.pixels.pin_memory().cuda(non_blocking=True)
        make_batched_views(batch._replace(pixels=pixels), views, dtype=torch.bfloat16)
        torch.cuda.synchronize()

    ways: dict[str, Way] = {
        "decode": decode_all,
        "worker": lambda: read_batch(source, views),
        "batched_views_cpu": lambda: make_batched_views(
            read_batch(source, views), views, dtype=torch.float32
        ),
    }
    if torch.cuda.is_available():
        ways["batched_views_cuda"] = on_cuda
    return ways


def view_rows(
    ways: dict[str, Way], source: FileSource, views: ViewSettings, console: Console
) -> Rows:
    """Measure ways from files to views on one core, and show them.

    Returns:
        Rows with name, images_per_s and milliseconds per image; with a way `pil_recipe` also
        ratio_to_pil; those of the batched back end also views_milliseconds, for views of decoded
        images on the device.
    """
    keep_freed_memory()  # as training and its workers do
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        milliseconds = _median_times(ways, len(source))
        alone = _views_alone(source, views)
    finally:
        torch.set_num_threads(threads)
    rows: Rows = []
    for name, t in milliseconds.items():
        rows.append({"name": name, "images_per_s": 1000 / t, "milliseconds": t})
        if "pil_recipe" in ways:
            rows[-1]["ratio_to_pil"] = milliseconds["pil_recipe"] / t
        if name in alone:
            rows[-1]["views_milliseconds"] = alone[name]
    _show(rows, source, views, console)
    return rows


def _median_times(ways: dict[str, Way], num_images: int) -> dict[str, float]:
    """Milliseconds per image; the ways take turns, so that a slow moment affects all of them.

    Short ways are measured before each long one: once per round they would show one moment of the
    machine, while long ones show its average.
    """

    def measured(way: Way) -> float:
        start = time.perf_counter()
        way()
        return 1000 * (time.perf_counter() - start) / num_images

    first = {name: measured(way) for name, way in ways.items()}  # warms up as well
    short = [name for name, t in first.items() if t < _SHORT * max(first.values())]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for long in (name for name in ways if name not in short):
            for name in (*short, long):
                times[name].append(measured(ways[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _views_alone(source: FileSource, views: ViewSettings) -> dict[str, float]:
    """Milliseconds per image to make views of decoded images, on every device here."""
    batch = read_batch(source, views)
    places = {"batched_views_cpu": (CPU, torch.float32)}
    if torch.cuda.is_available():
        places["batched_views_cuda"] = (torch.device("cuda"), torch.bfloat16)
    alone = {}
    for name, (device, dtype) in places.items():
        there = batch._replace(pixels=batch.pixels.to(device))
        seconds = []
        for _ in range(1 + _ROUNDS):
            synchronise(device)
            start = time.perf_counter()
            make_batched_views(there, views, dtype=dtype)
            synchronise(device)
            seconds.append(time.perf_counter() - start)
        alone[name] = 1000 * statistics.median(seconds[1:]) / len(source)
    return alone


def _show(rows: Rows, source: FileSource, views: ViewSettings, console: Console) -> None:
    title = (
        f"{len(source)} images of {source.where}, one core: {1 + views.rand_views} views of "
        f"{views.rand_size} px and {views.focal_views} of {views.focal_side} px"
    )
    columns = {
        "images_per_s": "images/s",
        "milliseconds": "ms per image",
        "ratio_to_pil": "x PIL recipe",
        "views_milliseconds": "views alone, ms",
    }
    columns = {key: text for key, text in columns.items() if any(key in row for row in rows)}
    table = Table("what", title=title)
    for text in columns.values():
        table.add_column(text, justify="right")
    for row in rows:
        numbers = (f"{row[key]:.2f}" if key in row else "" for key in columns)
        table.add_row(row["name"], *numbers)
    console.print(table)
