"""`python train.py plan=true ...`: what a training will cost, before anything is spent."""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from msn.commands.entry import build
from msn.commands.step_methods import Case, MsnStep, step_flops
from msn.data.datamodule import MSNDataModule
from msn.data.views import ViewSettings
from msn.errors import UserError
from msn.method.flops import Flops
from msn.training.launch import read_launch
from msn.training.memory import Memory, forecast_memory, suggest_chunk_size
from msn.training.module import MSNModule
from msn.training.rate import measure_matrix_rate, synchronise
from msn.training.trainer import resolve_precision

_IMAGENET_IMAGES = 1_281_167
_MEASURED_BATCH = {"cpu": 8, "cuda": 64}
_LONGEST_STEP = 20.0  # s; a step that would take longer is measured with the least batch, 2 images
_SPARE = 0.9  # share of the memory that a chunk may fill; allocators and libraries want the rest


class Plan(NamedTuple):
    """The numbers that are printed."""

    parameters: dict[str, int]
    flops: Flops
    memory: Memory
    processes: int
    batch_size: int
    """Images a step and process."""
    images: int
    epochs: int
    rate: float
    """Operations/s of one device in training."""
    source: str
    """Where the rate comes from."""

    @property
    def images_per_s(self) -> float:
        """Of all processes together."""
        return self.processes * self.rate / self.flops.total

    @property
    def hours(self) -> float:
        """Of the whole training."""
        return self.epochs * self.images / self.images_per_s / 3600


def run(config: DictConfig, settings: dict[str, Any], console: Console) -> Plan:
    """Print parameters, operations, memory and hours of a training; write nothing.

    Args:
        config: composed configuration of `train`.
        settings: the same, resolved.
        console: where to print.

    Raises:
        UserError: if a setting is wrong.
    """
    device = _device(settings)
    with torch.device("meta"):
        module: MSNModule = build(config, "module")
    processes = _processes(settings["trainer"], device)
    batch_size, rest = divmod(settings["data"]["global_batch_size"], processes)
    if rest or not batch_size:
        raise UserError(
            f"data.global_batch_size {settings['data']['global_batch_size']} is not divisible by "
            f"{processes} processes"
        )
    case = _case(settings, batch_size, device)
    flops = Flops(*(part / batch_size for part in step_flops(case)))
    images = _images(config, settings)
    rate, source = _rate(settings["planning"]["rate"], case, flops)
    plan = Plan(
        parameters=_parameters(module),
        flops=flops,
        memory=_forecast(module, case, case.chunk_size),
        processes=processes,
        batch_size=batch_size,
        images=images,
        epochs=settings["trainer"]["max_epochs"],
        rate=rate,
        source=source,
    )
    limit = settings["planning"]["memory"]
    limit = _memory_of(device) if limit is None else limit * 2**30
    chunks: list[int | None] = [None, *(2**k for k in range(batch_size.bit_length()))]
    peaks = {
        chunk: _forecast(module, case, chunk).peak for chunk in chunks if (chunk or 0) < batch_size
    }
    _show(plan, case, console)
    console.print(_advice(peaks, limit))
    return plan


def _forecast(module: MSNModule, case: Case, chunk_size: int | None) -> Memory:
    return forecast_memory(
        module.network,
        ViewSettings(**case.views),
        batch_size=case.batch_size,
        chunk_size=chunk_size,
        patch_drop=case.method["patch_drop"],
        precision=case.precision,
        use_kernels=case.kernels and case.device == "cpu",
    )


def _device(settings: dict[str, Any]) -> torch.device:
    wish = settings["trainer"]["accelerator"]
    on_cuda = wish in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_cuda else "cpu")


def _processes(trainer: dict[str, Any], device: torch.device) -> int:
    """Processes that the training would have, started already or by the trainer."""
    launch = read_launch(os.environ)
    nodes = trainer["num_nodes"] if launch is None else launch.nodes
    devices = trainer["devices"]
    if devices == "auto" and launch is not None:
        return nodes * launch.processes_per_node
    if devices == "auto":
        return nodes * (torch.cuda.device_count() if device.type == "cuda" else 1)
    count = len(devices) if isinstance(devices, list) else int(devices)
    return nodes * (torch.cuda.device_count() if count == -1 else count)


def _images(config: DictConfig, settings: dict[str, Any]) -> int:
    """Training images of an epoch: as stated, ImageNet's where it is not here yet, or counted."""
    if settings["planning"]["images"] is not None:
        return int(settings["planning"]["images"])
    if settings["data"]["source"] == "imagenet" and settings["data"]["root"] is None:
        return _IMAGENET_IMAGES
    data: MSNDataModule = build(config, "data")
    batch = data.global_batch_size
    return len(data.sampler(rank=0, world_size=1)) * batch


def _case(settings: dict[str, Any], batch_size: int, device: torch.device) -> Case:
    trainer = settings["trainer"]
    return Case(
        model=settings["model"],
        method=settings["method"],
        views=settings["data"]["views"],
        batch_size=batch_size,
        chunk_size=settings["chunk_size"],
        compile=settings["compile"],
        kernels=settings["kernels"],
        precision=resolve_precision(trainer["precision"], trainer["accelerator"]),
        device=device.type,
    )


def _rate(stated: float | None, case: Case, flops: Flops) -> tuple[float, str]:
    """Operations/s of one device: as stated, or of a few steps here; and which of the two."""
    if stated is not None:
        return float(stated), "stated"
    device = torch.device(case.device)
    dtype = torch.bfloat16 if case.precision == "bf16-mixed" else torch.float32
    batch = min(_MEASURED_BATCH[case.device], max(2, case.batch_size))
    if batch * flops.total / measure_matrix_rate(device, dtype) > _LONGEST_STEP:
        batch = 2
    case = case._replace(batch_size=batch)
    method = MsnStep(case)
    seconds = []
    for _ in range(3):  # the first compiles and warms up
        start = time.perf_counter()
        method.step()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return batch * flops.total / min(seconds[1:]), f"measured with {batch} images"


def _parameters(module: MSNModule) -> dict[str, int]:
    network = module.network
    return {
        "backbone": sum(p.numel() for p in network.anchor.trunk.parameters()),
        "projection head": sum(p.numel() for p in network.anchor.head.parameters()),
        "prototypes": network.prototypes.numel(),
    }


def _memory_of(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    told = Path("/proc/meminfo")
    if told.is_file():
        (line,) = (x for x in told.read_text().splitlines() if x.startswith("MemAvailable:"))
        return float(line.split()[1]) * 1024
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _show(plan: Plan, case: Case, console: Console) -> None:
    table = Table(title=f"Plan: {plan.epochs} epochs of {plan.images:,} images", show_header=False)
    table.add_column("what")
    table.add_column("how much", justify="right")
    for name, count in plan.parameters.items():
        table.add_row(f"{name}, parameters", f"{count / 1e6:.2f} M")
    for name in ("target", "rand", "focal", "total"):
        table.add_row(f"{name}, GFLOP an image", f"{getattr(plan.flops, name) / 1e9:.1f}")
    table.add_section()
    table.add_row(f"images a step on a device ({case.device})", str(plan.batch_size))
    table.add_row("chunk_size", str(case.chunk_size or "null"))
    table.add_row("precision", case.precision)
    for name, size in plan.memory._asdict().items():
        table.add_row(f"{name}, GiB", f"{size / 2**30:.2f}")
    table.add_section()
    table.add_row("devices", str(plan.processes))
    table.add_row(f"TFLOP/s a device ({plan.source})", f"{plan.rate / 1e12:.3f}")
    table.add_row("images/s", f"{plan.images_per_s:.1f}")
    table.add_row("hours", f"{plan.hours:.1f}")
    console.print(table)


def _advice(peaks: dict[int | None, float], limit: float) -> str:
    room = f"{limit / 2**30:.1f} GiB"
    try:
        chunk = suggest_chunk_size(peaks, _SPARE * limit)
    except ValueError:
        return f"Too much for {room} even with chunk_size=1: take more devices or a smaller model."
    if chunk is None:
        return f"The whole batch fits into {room}: chunk_size=null is fastest."
    return (
        f"For {room}: chunk_size={chunk} (peak {peaks[chunk] / 2**30:.1f} GiB, the same numbers, "
        "about a third more time)."
    )
