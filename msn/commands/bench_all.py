"""`python -m msn bench` (what=all): data path and step, and which of them limits training."""

import os
from typing import Any

import torch
from rich.console import Console

from msn.commands import bench_step, bench_views


def run(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Measure files to views, then the step, and name the bottleneck of a training here.

    Args:
        settings: as of `bench what=step`, and `images` (a folder; None takes two photographs).
        console: where the tables are shown.

    Returns:
        The rows of both, and {"name": "training", "images_per_s", "bottleneck", "limits": images/s
        that each part allows by itself}.

    Raises:
        UserError: a setting is wrong, or the folder holds no readable image.
    """
    bench_step.case_of(settings)  # told before minutes of measuring
    data_settings = {"images": settings["images"], "views": settings["data"]["views"]}
    data = bench_views.run(data_settings, console)
    step = bench_step.run(settings, console)
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
        f"Images/s that each part allows by itself on {cores} cores: {limits}.\n"
        f"A training here makes about {training['images_per_s']:.1f} images/s; the bottleneck is "
        f"{training['bottleneck']}: {_ADVICE[training['bottleneck']]}"
    )
    return [*data, *step, training]


_ADVICE = {
    "decoding": "more cores or workers, or smaller files (msn make_shards).",
    "views": "fewer or smaller views, or a device that makes them faster.",
    "step": "the data path keeps up; a faster device or a smaller model helps, workers do not.",
}


def combine(
    *, worker: float, views: float, step: float, cores: int, on_cuda: bool
) -> dict[str, Any]:
    """What a training reaches when its parts share a machine.

    Args:
        worker: seconds an image to read and decode on one core.
        views: seconds an image of its views on the device, on a CPU on one core.
        step: seconds an image.
        cores: that workers may use.
        on_cuda: workers decode beside the device, which makes views and steps in turn; on a CPU all
            three share the cores.

    Returns:
        The row `training`.
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
