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
    training = combine(
        {row["name"]: row["milliseconds"] / 1000 for row in data},
        1 / step[0]["images_per_s"],
        cores=cores or 1,
        on_cuda=torch.cuda.is_available(),
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


def combine(data: dict[str, float], step: float, *, cores: int, on_cuda: bool) -> dict[str, Any]:
    """What a training reaches when its parts share a machine.

    Args:
        data: seconds an image on one core of `worker` (read and decode) and `batched_views_cpu`
            (with views), on CUDA `batched_views_cuda`.
        step: seconds an image.
        cores: that workers may use.
        on_cuda: workers decode beside the device, which makes views and steps in turn; on a CPU all
            three share the cores.

    Returns:
        The row `training`.
    """
    worker = data["worker"]
    decoding = worker / cores
    if on_cuda:
        views = max(data["batched_views_cuda"] - worker, 0.0)
        total = max(decoding, views + step)
    else:
        views = max(data["batched_views_cpu"] - worker, 0.0) / cores
        total = decoding + views + step
    seconds = {"decoding": decoding, "views": views, "step": step}
    return {
        "name": "training",
        "images_per_s": 1 / total,
        "bottleneck": max(seconds, key=lambda name: seconds[name]),
        "limits": {name: 1 / s for name, s in seconds.items() if s > 0},
    }
