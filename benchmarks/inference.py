"""The backbone's forward pass in three ways.

    python benchmarks/inference.py [model=vit_s16] [json=FILE]

eager: attention as two matrix products and a softmax; sdpa: torch's fused attention, what the
backbone does anyway; compiled: sdpa under `torch.compile`.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.script import run_script
from msn.commands.entry import compose, to_plain
from msn.method.vit import VisionTransformer

BATCH_SIZES = (1, 2, 4, 8, 64)
MODES = ("eager", "sdpa", "compiled")
# The first pass compiles; a slow device gets few passes, a fast one enough for a steady median.
_WARM_UP, _LEAST_RUNS, _LEAST_SECONDS = 2, 3, 1.0


def run(config: Mapping[str, Any], console: Console) -> list[dict[str, Any]]:
    """Measure a backbone on this machine: CUDA in bfloat16, else the CPU in float32.

    Args:
        config: `model`, the name of one.
        console: where the table is shown.

    Returns:
        The rows of `measure`.

    Raises:
        UserError: if there is no such model.
    """
    on_cuda = torch.cuda.is_available()
    settings = to_plain(compose("bench", ["what=step", f"model={config['model']}"]))
    rows = measure(
        VisionTransformer(**settings["model"]),
        device=torch.device("cuda" if on_cuda else "cpu"),
        dtype=torch.bfloat16 if on_cuda else torch.float32,
    )
    show(rows, console)
    return rows


@torch.inference_mode()
def measure(
    trunk: VisionTransformer, *, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Time the forward pass at every batch size in every mode.

    Args:
        trunk: any backbone; moved to the device.
        device: where to run.
        dtype: of weights and images.

    Returns:
        Rows of plain data: name, mode, batch_size, milliseconds (median of a pass),
        images_per_second, speedup over eager at the same batch size, and on CUDA peak_memory_mib.
    """
    trunk = trunk.eval().to(device, dtype)
    compiled = torch.compile(_forward(trunk), dynamic=False)
    rows = []
    for batch_size in BATCH_SIZES:
        images = torch.randn(batch_size, 3, trunk.img_size, trunk.img_size)
        images = images.to(device, dtype)
        eager_milliseconds = 0.0
        for mode in MODES:
            forward = compiled if mode == "compiled" else _forward(trunk)
            with _attention(mode):
                milliseconds, memory = _time(forward, images)
            if mode == "eager":
                eager_milliseconds = milliseconds
            rows.append(
                {
                    "name": "inference",
                    "mode": mode,
                    "batch_size": batch_size,
                    "milliseconds": milliseconds,
                    "images_per_second": 1000 * batch_size / milliseconds,
                    "speedup": eager_milliseconds / milliseconds,
                    **memory,
                    "device": _name(device),
                    "dtype": str(dtype).removeprefix("torch."),
                    "model": dict(trunk.model_config),
                }
            )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print rows of `measure` in the manner of Hugging Face's table, a line per batch size."""
    first = rows[0]
    table = Table(title=f"Forward pass, {first['device']}, {first['dtype']}")
    for name in ("batch", *(f"{mode} (ms)" for mode in MODES), "sdpa / eager", "compiled / eager"):
        table.add_column(name, justify="right")
    for batch_size in BATCH_SIZES:
        line = {row["mode"]: row for row in rows if row["batch_size"] == batch_size}
        times = [f"{line[mode]['milliseconds']:.2f}" for mode in MODES]
        gains = [f"{line[mode]['speedup']:.2f}x" for mode in MODES[1:]]
        table.add_row(str(batch_size), *times, *gains)
    console.print(table)


def _forward(trunk: VisionTransformer) -> Callable[[Tensor], Tensor]:
    return lambda images: trunk.forward_features(images, norm=True)


@contextlib.contextmanager
def _attention(mode: str) -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH) if mode == "eager" else contextlib.nullcontext():
        yield


def _time(forward: Callable[[Tensor], Tensor], images: Tensor) -> tuple[float, dict[str, float]]:
    """Median milliseconds of a pass, and its peak memory where the device counts it."""
    on_cuda = images.device.type == "cuda"
    synchronise = torch.cuda.synchronize if on_cuda else _nothing
    for _ in range(_WARM_UP):
        forward(images)
    synchronise()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) < _LEAST_RUNS or sum(seconds) < _LEAST_SECONDS:
        start = time.perf_counter()
        forward(images)
        synchronise()
        seconds.append(time.perf_counter() - start)
    memory = {"peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20} if on_cuda else {}
    return 1000 * statistics.median(seconds), memory


def _nothing() -> None:
    pass


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def main() -> None:
    """Run with the settings of the command line."""
    run_script(run, {"model": "vit_s16"})


if __name__ == "__main__":
    main()
