"""`python train.py plan=true ...`: forecast memory and hours of a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from msn.commands.entry import build, find_target, one_line
from msn.commands.plan_settings import (
    check_settings,
    check_trainer,
    count_processes,
    planned_device,
)
from msn.commands.step import Case, TrainingStep, check_stream, product_type, seconds_per_step
from msn.data.datamodule import MSNDataModule
from msn.data.views import ViewSettings
from msn.errors import UserError
from msn.training.base import PretrainingModule
from msn.training.cost import (
    Memory,
    Operations,
    measure_matrix_rate,
    memory_installed,
    suggest_chunk_size,
)
from msn.training.strategy import compilation
from msn.training.trainer import resolve_precision

IMAGENET_IMAGES = 1_281_167
_BEYOND_REASON = 2  # times a device's memory; more than swap and the forecast's error
_FEW_PROTOTYPES = 2
_SMALLER = {
    "weights": "lower model.embed_dim, model.depth or, of MSN, method.num_prototypes",
    "views": "lower data.global_batch_size, or the number or size of data.views",
    "activations": "set chunk_size=N, or lower the number or size of data.views or model.embed_dim",
}
_MEASURED_BATCH = {"cpu": 8, "cuda": 64}
_LEAST_BATCH = 2  # BatchNorm needs two
_LONGEST_STEP = 20.0  # s; longer steps are measured with the smallest batch
_HINT = "planning.rate=OPERATIONS_PER_SECOND, e.g. planning.rate=4e14, plans without measuring"
_SPARE = 0.9  # share of the memory that a step may fill; allocators and libraries need the rest


class Plan(NamedTuple):
    """The figures of a plan."""

    parameters: dict[str, int]
    flops: Operations
    """Per image."""
    memory: Memory
    processes: int
    sharded: bool
    """Whether the network is sharded over the processes."""
    case: Case
    """With the batch size of one process."""
    images: int
    """Per epoch."""
    epochs: int

    def images_per_s(self, rate: float) -> float:
        """Images/s of all processes, at `rate` operations/s per device."""
        return self.processes * rate / self.flops.total

    def hours(self, rate: float) -> float:
        """Hours of the whole training, at `rate` operations/s per device."""
        return self.epochs * self.images / self.images_per_s(rate) / 3600


def run(config: DictConfig, settings: dict[str, Any], console: Console) -> Plan:
    """Print parameters, operations, memory and hours of a training; write nothing.

    Memory and advice come first, for measuring the speed may take a minute or fail.

    Args:
        config: composed configuration of `train`.
        settings: the same, resolved.
        console: where to print.

    Raises:
        UserError: if a setting is wrong, or the speed is not given and cannot be measured here.
    """
    check_settings(settings)
    find_target(config, "data", MSNDataModule)
    module = _outline(config, settings)
    plan = _plan(config, settings, module)
    _show_memory(plan, console)
    device, planning = torch.device(plan.case.device), settings["planning"]
    room = _memory_of(device) if planning["memory"] is None else planning["memory"] * 2**30
    console.print(_advice(_peaks(module, plan), room))
    if planning["rate"] is not None:
        _show_time(plan, float(planning["rate"]), "stated", console)
        return plan

    def alone(case: Case) -> Memory:
        return forecast(module, case)

    rate, images = measure_rate(plan.case, plan.flops, alone, _SPARE * _free_memory(device))
    _show_time(plan, rate, f"measured with {images} images", console)
    return plan


def refuse_beyond_reason(config: DictConfig, settings: dict[str, Any]) -> None:
    """Refuse a training whose step takes several times the memory of a device.

    Args:
        config: composed configuration of `train`, whose data exist.
        settings: the same, resolved.

    Raises:
        UserError: if it does, or a setting of module or trainer is wrong.
    """
    check_trainer(settings["trainer"])
    module = _outline(config, settings)
    device = planned_device(settings["trainer"]["accelerator"])
    processes = max(1, count_processes(settings["trainer"], device))  # fewer: the trainer refuses
    batch_size = max(1, settings["data"]["global_batch_size"] // processes)
    sharded = settings["trainer"]["strategy"] == "fsdp2"
    case = _case(settings, batch_size, device)
    memory = forecast(module, case, processes, sharded)
    limit = _memory_installed(device)
    if limit is not None and memory.peak > _BEYOND_REASON * limit:
        few = OmegaConf.merge(config, {"method": {"num_prototypes": _FEW_PROTOTYPES}})
        assert isinstance(few, DictConfig)
        without = forecast(_outline(few, settings), case, processes, sharded).peak
        largest = max(("weights", "views", "activations"), key=lambda part: getattr(memory, part))
        lower = _SMALLER[largest]
        if 2 * without < memory.peak:
            lower = f"lower method.num_prototypes={settings['method']['num_prototypes']}"
        raise UserError(
            f"a step would take {memory.peak / 2**30:,.0f} GiB and there are {limit / 2**30:,.0f}: "
            f"{lower}, or take more devices; plan=true says more"
        )


def _outline(config: DictConfig, settings: dict[str, Any]) -> PretrainingModule:
    """The module on the meta device, checked against views and batch size."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            module = build(config, "module", PretrainingModule)
    except (RuntimeError, TypeError, OverflowError) as error:  # too many elements for torch
        raise UserError(f"model or method: too large ({one_line(error)})") from None
    module.check_settings(
        ViewSettings(**settings["data"]["views"]),
        batch_size=settings["data"]["global_batch_size"],
        accumulated=settings["trainer"]["accumulate_grad_batches"],
    )
    return module


def _plan(config: DictConfig, settings: dict[str, Any], module: PretrainingModule) -> Plan:
    trainer, global_batch_size = settings["trainer"], settings["data"]["global_batch_size"]
    device = planned_device(trainer["accelerator"])
    processes = count_processes(trainer, device)
    batch_size, rest = divmod(global_batch_size, processes)
    if rest or not batch_size:
        raise UserError(
            f"data.global_batch_size {global_batch_size} is not divisible by {processes} processes"
        )
    sharded = trainer["strategy"] == "fsdp2"
    case = _case(settings, batch_size, device)
    images, limit = count_images(config, settings), trainer["limit_train_batches"]
    if limit is not None:
        images = min(images, limit * global_batch_size)
    return Plan(
        parameters=module.parameter_counts(),
        flops=module.operations(ViewSettings(**case.views)),
        memory=forecast(module, case, processes, sharded),
        processes=processes,
        sharded=sharded and processes > 1,
        case=case,
        images=images,
        epochs=trainer["max_epochs"],
    )


def forecast(
    module: PretrainingModule, case: Case, processes: int = 1, sharded: bool = False
) -> Memory:
    """Memory of a training step, see `training.cost.forecast_memory`."""
    compiles = compilation(case.compile)
    return module.forecast_memory(
        ViewSettings(**case.views),
        batch_size=case.batch_size,
        chunk_size=case.chunk_size,
        precision=case.precision,
        compiled=case.device == "cuda" if compiles is None else compiles,
        processes=processes,
        sharded=sharded,
    )


def _peaks(module: PretrainingModule, plan: Plan) -> dict[int | None, float]:
    """Forecast peak without chunks (None) and with each power of two below the batch size."""
    chunks = [2**k for k in range(plan.case.batch_size.bit_length())]
    return {
        chunk: forecast(
            module, plan.case._replace(chunk_size=chunk), plan.processes, plan.sharded
        ).peak
        for chunk in (None, *(chunk for chunk in chunks if chunk < plan.case.batch_size))
    }


def less_memory(
    settings: dict[str, Any], module: PretrainingModule, device: torch.device, processes: int
) -> str:
    """Advice, by the forecast, for a training whose step has run out of memory.

    Args:
        settings: resolved configuration of `train`.
        module: of the training.
        device: of this process.
        processes: number that train together.
    """
    batch_size = settings["data"]["global_batch_size"]
    case = _case(settings, batch_size // processes, device)
    sharded = settings["trainer"]["strategy"] == "fsdp2" and processes > 1

    def peak(chunk: int | None) -> float:
        return forecast(module, case._replace(chunk_size=chunk), processes, sharded).peak

    now, before = case.chunk_size or case.batch_size, peak(case.chunk_size)
    limit = _SPARE * (_memory_of(device) or before) if device.type == "cuda" else before
    peaks = {2**k: peak(2**k) for k in range(now.bit_length()) if 2**k < now}
    fitting = [chunk for chunk, needed in peaks.items() if needed < min(before, limit)]
    if not fitting:
        return f"a data.global_batch_size below {batch_size}, or a smaller model, takes less"
    chunk = max(fitting)
    return (
        f"chunk_size={chunk} changes no number and takes {peaks[chunk] / 2**30:.1f} GiB per device "
        f"by the forecast, instead of {before / 2**30:.1f}; a lower data.global_batch_size, of a "
        "new run, takes less too"
    )


def count_images(config: DictConfig, settings: dict[str, Any], *, all_: bool = False) -> int:
    """Training images of an epoch: as stated, ImageNet's where it is not here yet, or counted.

    Counted are those of whole batches, or `all_`.
    """
    if settings["planning"]["images"] is not None:
        return int(settings["planning"]["images"])
    if settings["data"]["source"] == "imagenet" and settings["data"]["root"] is None:
        return IMAGENET_IMAGES
    data: MSNDataModule = build(config, "data", MSNDataModule)
    if all_:
        return len(data.pools.train)
    return len(data.sampler(rank=0, world_size=1)) * data.global_batch_size


def _case(settings: dict[str, Any], batch_size: int, device: torch.device) -> Case:
    trainer = settings["trainer"]
    precision = trainer["precision"]
    if precision == "auto" and device.type == "cuda":  # the device need not be here
        precision = "bf16-mixed"
    case = Case(
        model=settings["model"],
        method=settings["method"],
        views=settings["data"]["views"],
        batch_size=batch_size,
        chunk_size=settings["chunk_size"],
        compile=settings["compile"],
        precision=resolve_precision(precision, trainer["accelerator"]),
        device=device.type,
    )
    return check_stream(case)


def _memory_of(device: torch.device) -> float | None:
    """Free bytes of the CPU's memory, or all of a GPU's; None if there is no such device."""
    if device.type == "cpu":
        return _free_memory(device)
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(device).total_memory)
    return None


def _memory_installed(device: torch.device) -> float | None:
    """Bytes of a device of this machine, free or not."""
    if device.type == "cpu":
        return memory_installed()
    return _memory_of(device)


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if told.is_file():
        (line,) = (x for x in told.read_text().splitlines() if x.startswith("MemAvailable:"))
        return float(line.split()[1]) * 1024
    return _memory_installed(torch.device("cpu")) or 0.0


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column("what", overflow="fold")
    table.add_column("how much", justify="right", no_wrap=True)
    return table


def _show_memory(plan: Plan, console: Console) -> None:
    table = _table(f"Plan: {plan.epochs} epochs of {plan.images:,} images")
    for name, count in plan.parameters.items():
        table.add_row(f"{name}, parameters", f"{count / 1e6:.2f} M")
    for name in (*plan.flops._fields, "total"):
        table.add_row(f"{name}, GFLOP per image", f"{getattr(plan.flops, name) / 1e9:.1f}")
    table.add_section()
    cut = ", the network sharded over them" if plan.sharded else ""
    table.add_row(f"devices{cut}", str(plan.processes))
    table.add_row(f"images per step and device ({plan.case.device})", str(plan.case.batch_size))
    table.add_row("chunk_size", str(plan.case.chunk_size or "null"))
    table.add_row("precision", plan.case.precision)
    for name, size in plan.memory._asdict().items():
        table.add_row(f"{name}, GiB", f"{size / 2**30:.2f}")
    console.print(table)


def _show_time(plan: Plan, rate: float, source: str, console: Console) -> None:
    table = _table("Time")
    table.add_row(f"TFLOP/s per device ({source})", f"{rate / 1e12:.3f}")
    table.add_row("images/s", f"{plan.images_per_s(rate):.1f}")
    table.add_row("hours", f"{plan.hours(rate):.1f}")
    console.print(table)


def _advice(peaks: dict[int | None, float], limit: float | None) -> str:
    if limit is None:
        return "planning.memory=GiB of one device gives a chunk_size that fits."
    room = f"{limit / 2**30:.1f} GiB"
    try:
        chunk = suggest_chunk_size(peaks, _SPARE * limit)
    except ValueError:
        return f"Too much for {room} even with chunk_size=1: use more devices or a smaller model."
    if chunk is None:
        return f"The whole batch fits into {room}: chunk_size=null is fastest."
    return (
        f"For {room}: chunk_size={chunk} (peak {peaks[chunk] / 2**30:.1f} GiB, same results, about "
        "a third more time)."
    )


def measure_rate(
    case: Case, flops: Operations, forecast: Callable[[Case], Memory], room: float
) -> tuple[float, int]:
    """Operations/s of one device of this machine in training steps.

    Args:
        case: the training, on a device that is here.
        flops: per image.
        forecast: memory of a case in a single process.
        room: bytes that a step may take.

    Returns:
        The rate, and the batch size of the measured steps.

    Raises:
        UserError: if no batch fits, by forecast or by trial.
    """
    device = torch.device(case.device)
    batch = _batch_that_fits(case, forecast, room)
    try:
        limit = measure_matrix_rate(device, product_type(case.precision))
        if batch * flops.total / limit > _LONGEST_STEP:
            batch = _LEAST_BATCH
        seconds = _seconds_per_step(case._replace(batch_size=batch), device)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory in measured steps of {batch} images: {_HINT}") from None
    return batch * flops.total / seconds, batch


def _batch_that_fits(case: Case, forecast: Callable[[Case], Memory], room: float) -> int:
    batch = min(_MEASURED_BATCH[case.device], max(_LEAST_BATCH, case.batch_size))
    while (peak := forecast(case._replace(batch_size=batch)).peak) > room:
        if batch == _LEAST_BATCH:
            raise UserError(
                f"steps of {batch} images would take {peak / 2**30:.1f} GiB to measure and "
                f"{room / 2**30:.1f} are free here: {_HINT}"
            )
        batch = max(_LEAST_BATCH, batch // 2)
    return batch


def _seconds_per_step(case: Case, device: torch.device) -> float:
    method = TrainingStep(case)
    return min([seconds_per_step(method, 1, device) for _ in range(3)][1:])  # the first compiles
