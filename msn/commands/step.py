"""Time a training step, for `msn bench`, plans and the scripts of `benchmarks/`."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from msn.data.batched_views import make_batched_views
from msn.data.dataset import Subset, TrainingSet
from msn.data.sampler import BatchKey
from msn.data.sources import ArraySource
from msn.data.views import Views, ViewSettings, view_settings
from msn.errors import UserError
from msn.method import optim
from msn.method.optim import BufferGuard, FiniteCheck
from msn.method.vit import SIZES
from msn.schema import whole_number
from msn.training.base import PretrainingModule
from msn.training.cost import Operations, measure_matrix_rate, synchronise
from msn.training.module import MSNModule, build_module
from msn.training.strategy import compilation
from msn.training.trainer import resolve_precision

WARM_UP = 2  # steps before any is timed; the first one compiles
_CUDA_SECONDS = 0.5  # on CUDA, a measurement takes as many steps as fit in this time
_CPU_BATCH, _CUDA_BATCH = 8, 128
_MAX_SKIPPED = 3
_EPOCHS, _STEPS_PER_EPOCH = 1000, 100  # so that schedules have values
_IMAGE_HEIGHT, _IMAGE_WIDTH = 375, 500  # px, of the decoded images that views are cut from


class Case(NamedTuple):
    """What is measured, as plain data that can be sent to other processes."""

    model: dict[str, Any]
    method: dict[str, Any]
    views: dict[str, Any]
    batch_size: int
    chunk_size: int | None
    compile: bool | str
    precision: str
    device: str


def case_of(settings: dict[str, Any]) -> Case:
    """What `bench what=step` measures with these settings.

    Raises:
        UserError: a setting is wrong.
    """
    wanted = {f"model.{name}": settings["model"].get(name, 0) for name in SIZES}
    wanted["method.num_prototypes"] = settings["method"].get("num_prototypes", 0)
    if missing := [key for key, value in wanted.items() if value is None]:
        raise UserError(
            f"{missing[0]} is null: give init=PATH to msn bench, or model=NAME and "
            "method.num_prototypes=N"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = settings["batch_size"]
    if batch is None:
        batch = _CUDA_BATCH if device == "cuda" else _CPU_BATCH
    whole_number("batch_size", batch, 2)
    whole_number("rounds", settings["rounds"], 1)
    if settings["chunk_size"] is not None:
        whole_number("chunk_size", settings["chunk_size"], 1)
    compilation(settings["compile"])
    view_settings(settings["data"]["views"])
    case = Case(
        model=settings["model"],
        method=settings["method"],
        views=settings["data"]["views"],
        batch_size=batch,
        chunk_size=settings["chunk_size"],
        compile=settings["compile"],
        precision=resolve_precision(settings["trainer"]["precision"], "auto"),
        device=device,
    )
    return check_stream(case)


def check_stream(case: Case) -> Case:
    """Refuse `method.bf16_stream` where nothing else is in bf16."""
    if case.method.get("bf16_stream") and case.precision != "bf16-mixed":
        raise UserError(
            f"method.bf16_stream=true is for trainer.precision=bf16-mixed, got {case.precision}"
        )
    return case


def step_flops(case: Case) -> Operations:
    """Nominal operations of one step, see `msn.training.cost`."""
    with torch.device("meta"):
        module = _module_of(case)
    an_image = module.operations(ViewSettings(**case.views))
    return type(an_image)(*(case.batch_size * part for part in an_image))


def _module_of(case: Case) -> PretrainingModule:
    return build_module(
        model=case.model,
        method=case.method,
        seed=0,
        chunk_size=case.chunk_size,
        compile=case.compile,
    )


class Step(Protocol):
    """One method, ready to step."""

    def step(self) -> None:
        """Forward, backward, optimiser, EMA."""


class TrainingStep:
    """The product's step, as a `PretrainingModule` and Lightning take it."""

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        self.module = _module_of(case).to(self.device, weight_type(case.precision))
        self.module.check_settings(
            ViewSettings(**case.views), batch_size=case.batch_size, accumulated=1
        )
        self.module.plan_schedule(epochs=_EPOCHS, steps_per_epoch=_STEPS_PER_EPOCH)
        self.module.network.train()
        # As in training by default.
        self.check = self.module.finite_check = FiniteCheck(_MAX_SKIPPED)
        self.compiled = self.module.make_fast(self.device)
        self.optimizer = self.module.configure_optimizers()
        self._dtype = product_type(case.precision)
        if self.module.reads_pixels:
            self._dtype = weight_type(case.precision)
        self.views = random_views(case, dtype=self._dtype)
        self.make_views: ViewMaker | None = None

    def step(self) -> None:
        """As in training, the views already made."""
        self._forward(self.views).backward()
        self._finish_step()
        self._end_step()

    def parts(self) -> dict[str, float]:
        """Seconds of each part of another step, waiting for the device after each part."""
        seconds: dict[str, float] = {}

        def timed(name: str, run: Callable[[], Any]) -> Any:
            synchronise(self.device)
            start = time.perf_counter()
            result = run()
            synchronise(self.device)
            seconds[name] = time.perf_counter() - start
            return result

        if self.make_views is None:  # decoded images take memory, so they are made only here
            self.make_views = ViewMaker(self.case, self._dtype)
        views = timed("views", self.make_views)
        if isinstance(self.module, MSNModule):
            loss = self._msn_parts(self.module, views, timed)
        else:
            loss = timed("forward", lambda: self._forward(views))
        timed("backward", loss.backward)
        timed("optimiser", self._finish_step)
        timed("ema", self._end_step)
        if not isinstance(self.module, MSNModule):
            seconds["optimiser"] += seconds.pop("ema")  # MAE has no target
        return seconds

    def _msn_parts(
        self, module: MSNModule, views: Views, timed: Callable[[str, Callable[[], Any]], Any]
    ) -> Tensor:
        network, chunk = module.network, self.case.chunk_size
        target, rand, focal, _ = views
        kept = module.draw_kept_patches(rand)
        with self._autocast():
            wanted = timed("target", lambda: network.project_target(target, chunk))
            anchors = timed("anchors", lambda: network.project_anchors(rand, focal, kept, chunk))
            terms = timed("loss", lambda: module.loss(anchors, wanted, network.prototypes, 0.25))
        loss: Tensor = terms.loss
        return loss

    def _forward(self, views: Views) -> Tensor:
        with self._autocast():
            loss: Tensor = self.module.training_step(views, 0)["loss"]
        return loss

    def _finish_step(self) -> None:
        assert self.module.schedule is not None
        self._buffers = BufferGuard(self.module.network)
        self.module.configure_gradient_clipping(self.optimizer)
        optim.set_values(self.optimizer, self.module.schedule.at(1))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _end_step(self) -> None:
        self.module.after_step(1, self.check.skip)
        self._buffers.restore_if(self.check.skip)

    def _autocast(self) -> torch.autocast:
        half = self.case.precision == "bf16-mixed"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)


class ViewMaker:
    """Makes the views of a batch of noise, whose pixels are on the device."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self._settings, self._dtype = ViewSettings(**case.views), dtype
        shape = (case.batch_size, _IMAGE_HEIGHT, _IMAGE_WIDTH, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        source = ArraySource(where="noise", pixels=pixels, labels=None, classes=[])
        images = TrainingSet(Subset(source), self._settings, seed=0, reduce=True)
        batch = images[BatchKey(0, 0, np.arange(case.batch_size))]
        self._batch = batch._replace(pixels=batch.pixels.to(case.device))
        self()  # warms up

    def __call__(self) -> Views:
        """The views of the batch."""
        views = make_batched_views(self._batch, self._settings, dtype=self._dtype)
        return views._replace(origin=_origin(len(self._batch.indices)))


def _origin(images: int) -> BatchKey:
    return BatchKey(0, 0, np.arange(images))


def weight_type(precision: str) -> torch.dtype:
    """Type of a network's weights; autocast takes products in a smaller one."""
    return torch.float64 if precision == "64-true" else torch.float32


def product_type(precision: str) -> torch.dtype:
    """Type of matrix products and views."""
    return torch.bfloat16 if precision == "bf16-mixed" else weight_type(precision)


def random_views(case: Case, *, dtype: torch.dtype = torch.float32) -> Views:
    """Normal noise in the shapes of the case's views, on its device."""
    settings, batch = ViewSettings(**case.views), case.batch_size
    large, small = settings.rand_size, settings.focal_side

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=case.device, dtype=dtype)

    return Views(
        noise(batch, 3, large, large),
        noise(settings.rand_views, batch, 3, large, large),
        noise(settings.focal_views, batch, 3, small, small),
        _origin(batch),
    )


def bench_step(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Measure the step and the rate of a large matrix product in turns.

    Args:
        settings: `model`, `method`, `data`, `trainer` as for training, `batch_size`, `rounds`,
            `chunk_size`, `compile`.
        console: prints the tables.

    Returns:
        The rows of `step_rows`.

    Raises:
        UserError: a setting is wrong.
    """
    case = case_of(settings)
    device, dtype = torch.device(case.device), product_type(case.precision)
    measure_matrix_rate(device, dtype)  # takes its memory before the step fills the device
    before, method = memory_of_process("VmRSS"), TrainingStep(case)
    first = [seconds_per_step(method, 1, device) for _ in range(WARM_UP)]
    # Memory has reached its peak; the parts below also make views, which are not counted.
    peak = peak_memory(device, before)
    method.parts()
    repeats = repeats_of(first[-1], device)
    seconds, rates, parts = [], [], []
    for _ in range(settings["rounds"]):
        rates.append(measure_matrix_rate(device, dtype))
        seconds.append(seconds_per_step(method, repeats, device))
        parts.append(method.parts())
    facts = {
        "first_step_s": first[0],
        "peak_bytes": peak,
        "compiled": method.compiled,
        "parts": median_parts(parts),
    }
    rows = step_rows(case, {"msn": seconds}, statistics.median(rates), {"msn": facts})
    show_step(rows, case, console)
    return rows


def seconds_per_step(method: Step, number: int, device: torch.device) -> float:
    """Mean seconds per step of some steps, waiting for the device only at the end."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(number):
        method.step()
    synchronise(device)
    return (time.perf_counter() - start) / number


def repeats_of(seconds: float, device: torch.device) -> int:
    """Steps of a measurement: on CUDA, as many as fit in half a second; else one."""
    return 1 if device.type != "cuda" else max(1, round(_CUDA_SECONDS / seconds))


def median_parts(parts: list[dict[str, float]]) -> dict[str, float]:
    """The median over some steps of every part."""
    return {name: statistics.median(part[name] for part in parts) for name in parts[0]}


def peak_memory(device: torch.device, before: int | None) -> int | None:
    """Peak bytes of steps: on the device, or in this process minus `before`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = memory_of_process("VmHWM")
    return None if peak is None or before is None else peak - before


def memory_of_process(name: str) -> int | None:
    """VmRSS or VmHWM (its peak) of this process in bytes; None if the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def step_rows(
    case: Case, seconds: dict[str, list[float]], rate: float, facts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row per method, and one for the limit.

    Args:
        case: what was measured.
        seconds: per step, of every round, by the method's name.
        rate: operations/s of a large matrix product.
        facts: further entries of each method's row.

    Returns:
        Rows with name (of the methods, then matmul_limit), s_per_step, images_per_s, flops_per_s
        (nominal, see `msn.training.cost`), share_of_limit, peak_bytes (beyond what was loaded; None
        where the system does not tell), first_step_s, the settings that the figures depend on
        (precision is each row's own), and of msn parts.
    """
    flops = step_flops(case).total
    common = {
        "batch_size": case.batch_size,
        "device": torch.cuda.get_device_name()
        if case.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "model": case.model,
        "patch_drop": case.method.get("patch_drop", case.method.get("mask_ratio")),
        "chunk_size": case.chunk_size,
        "compile": case.compile,
    }
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append(
            {
                "name": name,
                "s_per_step": median,
                "images_per_s": case.batch_size / median,
                "flops_per_s": flops / median,
                "share_of_limit": flops / median / rate,
                **facts[name],
                "precision": case.precision if name == "msn" else "32-true",
                **common,
            }
        )
    limit = {
        "name": "matmul_limit",
        "s_per_step": flops / rate,
        "images_per_s": case.batch_size * rate / flops,
        "flops_per_s": rate,
        "share_of_limit": 1.0,
        "peak_bytes": None,
        "precision": case.precision,
    }
    return [*rows, {**limit, **common}]


def show_step(rows: list[dict[str, Any]], case: Case, console: Console) -> None:
    """Print the comparison and the time by part."""
    first = rows[0]
    compiled = "compiled" if first["compiled"] else "not compiled"
    console.print(
        f"A training step of {case.batch_size} images on {first['device']}: "
        f"{step_flops(case).total / 1e9:,.0f} GFLOP nominal; msn in {case.precision}, {compiled}"
    )
    table = Table()
    table.add_column("step")
    for column in ("s", "x msn", "images/s", "GFLOP/s", "of limit", "GiB", "first s"):
        table.add_column(column, justify="right")
    for row in rows:
        peak, start = row["peak_bytes"], row.get("first_step_s")
        table.add_row(
            row["name"],
            f"{row['s_per_step']:.3f}",
            f"{row['s_per_step'] / first['s_per_step']:.2f}",
            f"{row['images_per_s']:.2f}",
            f"{row['flops_per_s'] / 1e9:,.0f}",
            f"{100 * row['share_of_limit']:.0f} %",
            "" if peak is None else f"{peak / 2**30:.2f}",
            "" if start is None else f"{start:.1f}",
        )
    console.print(table)
    parts = Table(title="Parts of msn's step, each waited for; ms")
    for name in first["parts"]:
        parts.add_column(name, justify="right")
    parts.add_row(*(f"{1000 * seconds:.1f}" for seconds in first["parts"].values()))
    console.print(parts)
