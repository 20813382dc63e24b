"""`python -m msn bench what=views|decode`: images/s of one core from files to views."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from rich.console import Console
from rich.table import Table

from msn.data.batched_views import make_batched_views
from msn.data.dataset import ImageBatch, Subset, TrainingSet
from msn.data.recipe import pil_recipe
from msn.data.reference_views import make_reference_views
from msn.data.sampler import BatchKey
from msn.data.sources import FileSource, folder_source
from msn.data.tables import StringTable
from msn.data.views import ViewSettings, view_settings
from msn.errors import UserError
from msn.images.decode import decode, full_size
from msn.training.cost import synchronise
from msn.training.strategy import keep_freed_memory

DECODING = ("decode", "worker", "pil_recipe")
CPU = torch.device("cpu")
_ROUNDS = 5  # the median of so many; every round measures everything
_SHORT = 0.1  # of the longest time: what is measured more than once a round
_BATCH = 120  # images of a batch, and as many of a folder are measured

Measure = Callable[[], None]


def run(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Measure every way from files to views on one core, and on the GPU where there is one.

    Args:
        settings: `images` (a folder; None takes scikit-learn's two photographs) and `views`.
        console: where the table is shown.

    Returns:
        Rows with name, images_per_s, ratio_to_pil and milliseconds an image; those of the batched
        back end also views_milliseconds, of the views alone, decoded images lying on the device.

    Raises:
        UserError: a setting is wrong, or the folder holds no readable image.
    """
    return measure_and_show(settings, console, only=None)


def measure_and_show(
    settings: dict[str, Any], console: Console, *, only: tuple[str, ...] | None
) -> list[dict[str, Any]]:
    """Measure the named ways, or all of them."""
    keep_freed_memory()  # as training and its workers do
    views = view_settings(settings["views"])
    source = _photos(settings["images"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ways = _ways(source, views)
        ways = {name: way for name, way in ways.items() if only is None or name in only}
        milliseconds = _median_times(ways, len(source))
        alone = _views_alone(source, views) if only is None else {}
    finally:
        torch.set_num_threads(threads)
    pil = milliseconds["pil_recipe"]
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "images_per_s": 1000 / t,
            "ratio_to_pil": pil / t,
            "milliseconds": t,
            **({"views_milliseconds": alone[name]} if name in alone else {}),
        }
        for name, t in milliseconds.items()
    ]
    _show(rows, source, views, console)
    return rows


def _photos(folder: str | None) -> FileSource:
    root = str(Path(sklearn.__file__).parent / "datasets" / "images") if folder is None else folder
    source = folder_source(root, key="images", use_labels=False)
    chosen = np.linspace(0, len(source) - 1, min(_BATCH, len(source))).astype(int)
    names = [source.name(int(i)) for i in chosen]
    if folder is None:
        names = names * (_BATCH // len(names))
    paths = StringTable.from_strings(names)
    return FileSource(where=root, root=source.root, paths=paths, labels=None, classes=[])


def _ways(source: FileSource, views: ViewSettings) -> dict[str, Measure]:
    """What is measured; each reads every image once, so that times are comparable."""
    paths = [Path(source.root, source.name(i)) for i in range(len(source))]
    images = TrainingSet(Subset(source), views, seed=0, reduce=True)
    whole = TrainingSet(Subset(source), views, seed=0, reduce=False)
    recipe = pil_recipe(views)

    def batches(data: TrainingSet) -> list[ImageBatch]:
        return [data[BatchKey(0, 0, np.arange(len(source)))]]

    bad = [image for batch in batches(images) for image in batch.bad]
    if bad:
        raise UserError(f"images={source.where}: {bad[0].path} cannot be read ({bad[0].reason})")

    def batched_on_cuda() -> None:
        for batch in batches(images):
            pixels = batch.pixels.pin_memory().cuda(non_blocking=True)
            make_batched_views(batch._replace(pixels=pixels), views, dtype=torch.bfloat16)
        torch.cuda.synchronize()

    def each(function: Callable[[Any], object], items: Callable[[], list[Any]]) -> Measure:
        def run_all() -> None:
            for item in items():
                function(item)

        return run_all

    def reference(batch: ImageBatch) -> object:
        return make_reference_views(batch, views, device=CPU, dtype=torch.float32)

    def batched(batch: ImageBatch) -> object:
        return make_batched_views(batch, views, dtype=torch.float32)

    ways: dict[str, Measure] = {
        "decode": each(lambda path: decode(path.read_bytes(), full_size), lambda: paths),
        "worker": lambda: (batches(images), None)[1],
        "pil_recipe": each(lambda path: recipe(path.read_bytes()), lambda: paths),
        "reference_views": each(reference, lambda: batches(whole)),
        "batched_views_cpu": each(batched, lambda: batches(images)),
    }
    if torch.cuda.is_available():
        ways["batched_views_cuda"] = batched_on_cuda
    return ways


def _views_alone(source: FileSource, views: ViewSettings) -> dict[str, float]:
    """Milliseconds an image of the batched back end's views by themselves, on every device here."""
    images = TrainingSet(Subset(source), views, seed=0, reduce=True)
    batch = images[BatchKey(0, 0, np.arange(len(source)))]
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


def _median_times(ways: dict[str, Measure], num_images: int) -> dict[str, float]:
    """Milliseconds an image; the ways take turns, so that a slow moment hits all of them alike.

    Short ways are measured before each of the long ones: once a round would show them one moment of
    the machine and the long ones its average.
    """

    def measured(way: Measure) -> float:
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


def _show(
    rows: list[dict[str, Any]], source: FileSource, views: ViewSettings, console: Console
) -> None:
    title = (
        f"{len(source)} images of {source.where}, one core: {1 + views.rand_views} views of "
        f"{views.rand_size} px and {views.focal_views} of {views.focal_side} px"
    )
    table = Table(title=title)
    table.add_column("what")
    columns = ["images/s", "ms an image", "x PIL recipe"]
    columns += ["views alone, ms"] if any("views_milliseconds" in row for row in rows) else []
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (row["images_per_s"], row["milliseconds"], row["ratio_to_pil"])
        alone = [f"{row['views_milliseconds']:.3f}"] if "views_milliseconds" in row else []
        table.add_row(row["name"], *(f"{number:.2f}" for number in numbers), *alone)
    console.print(table)
