"""`python -m msn bench what=step`: the training step beside plain ones and the machine's limit."""

import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from msn.commands.step_methods import PARTS, Case, available, step_flops
from msn.commands.step_worker import Worker
from msn.data.views import ViewSettings
from msn.errors import UserError
from msn.training.rate import measure_matrix_rate
from msn.training.trainer import resolve_precision

_CPU_BATCH, _CUDA_BATCH = 8, 128
_WARM_UP = 2  # steps of each method before any is timed; the first one compiles
_CUDA_SECONDS = 0.5  # on CUDA a measurement is as many steps as take about this long


def run(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Measure the product's step, the yardstick's, lightly's if installed, and the matrix rate.

    All take turns within one run and the median counts; each lives in a process of its own.

    Args:
        settings: `model`, `method`, `data`, `trainer` as for training, `batch_size`, `rounds`,
            `chunk_size`, `compile`, `kernels`, `against`.
        console: where the tables are shown.

    Returns:
        Rows with name (msn, eager_yardstick, lightly, matmul_limit), s_per_step, images_per_s,
        flops_per_s (nominal, see `msn.method.flops`), share_of_limit, peak_bytes (beyond the
        loaded libraries; None where the system does not tell), first_step_s, and of msn parts.

    Raises:
        UserError: a setting is wrong.
    """
    case = case_of(settings)
    names = [name for name in available() if name == "msn" or name in settings["against"]]
    rounds = settings["rounds"]
    if not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"rounds must be a whole number >= 1, got {rounds!r}")
    seconds, rates, facts = _take_turns(names, case, rounds)
    rows = _rows(case, seconds, statistics.median(rates), facts)
    show(rows, case, console)
    return rows


def case_of(settings: dict[str, Any]) -> Case:
    """What the settings ask to be measured.

    Raises:
        UserError: a setting is wrong.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = settings["batch_size"]
    if batch is None:
        batch = _CUDA_BATCH if device == "cuda" else _CPU_BATCH
    if not isinstance(batch, int) or batch < 2:
        raise UserError(f"batch_size must be a whole number >= 2, got {batch!r}")
    unknown = set(settings["against"]) - {"eager_yardstick", "lightly"}
    if unknown:
        raise UserError(
            f"against={sorted(unknown)}: allowed are eager_yardstick, lightly, or [] for neither"
        )
    ViewSettings(**settings["data"]["views"])
    return Case(
        model=settings["model"],
        method=settings["method"],
        views=settings["data"]["views"],
        batch_size=batch,
        chunk_size=settings["chunk_size"],
        compile=settings["compile"],
        kernels=settings["kernels"],
        precision=resolve_precision(settings["trainer"]["precision"], "auto"),
        device=device,
    )


def _take_turns(
    names: list[str], case: Case, rounds: int
) -> tuple[dict[str, list[float]], list[float], dict[str, dict[str, Any]]]:
    """Seconds a step and the matrix rate of every round, and what is measured once."""
    device = torch.device(case.device)
    dtype = torch.bfloat16 if case.precision == "bf16-mixed" else torch.float32
    workers, facts, rates = {}, {}, []
    try:
        for name in names:
            workers[name] = Worker(name, case)
            first = [workers[name].ask("steps") for _ in range(_WARM_UP)]
            # Steps have reached their full size; the parts below make views, which is other memory.
            peak = workers[name].ask("peak_bytes")
            facts[name] = {"first_step_s": first[0], "peak_bytes": peak}
            facts[name]["repeats"] = _repeats(first[-1], device)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        parts = []
        for _ in range(rounds):
            rates.append(measure_matrix_rate(device, dtype))
            for name, worker in workers.items():
                seconds[name].append(worker.ask("steps", facts[name]["repeats"]))
            parts.append(workers["msn"].ask("parts"))
        facts["msn"]["compiled"] = workers["msn"].ask("compiled")
        facts["msn"]["parts"] = {
            name: statistics.median(part[name] for part in parts) for name in PARTS
        }
    finally:
        for worker in workers.values():
            worker.close()
    return seconds, rates, facts


def _repeats(seconds: float, device: torch.device) -> int:
    return 1 if device.type != "cuda" else max(1, round(_CUDA_SECONDS / seconds))


def _rows(
    case: Case, seconds: dict[str, list[float]], rate: float, facts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    flops = step_flops(case).total
    common = {
        "batch_size": case.batch_size,
        "device": device_name(case),
        "precision": case.precision,
        "model": case.model,
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
                **{key: value for key, value in facts[name].items() if key != "repeats"},
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
    }
    return [*rows, {**limit, **common}]


def device_name(case: Case) -> str:
    """The device as a person knows it."""
    if case.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def show(rows: list[dict[str, Any]], case: Case, console: Console) -> None:
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
    parts = Table(title="Where msn's step goes, each part waited for; ms")
    for name in PARTS:
        parts.add_column(name, justify="right")
    parts.add_row(*(f"{1000 * first['parts'][name]:.1f}" for name in PARTS))
    console.print(parts)
