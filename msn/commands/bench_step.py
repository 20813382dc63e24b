"""`python -m msn bench what=step`: the training step beside plain ones and the machine's limit."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from msn.commands.step_methods import PARTS, Case, available, product_type, step_flops
from msn.commands.step_worker import MethodFailed, Worker
from msn.data.views import ViewSettings
from msn.errors import UserError
from msn.schema import take
from msn.training.cost import measure_matrix_rate
from msn.training.strategy import compilation
from msn.training.trainer import resolve_precision

_CPU_BATCH, _CUDA_BATCH = 8, 128
_WARM_UP = 2  # steps of each method before any is timed; the first one compiles
_COMPARISONS = ("eager_yardstick", "lightly")
_CUDA_SECONDS = 0.5  # on CUDA a measurement is as many steps as take about this long


def run(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Measure the product's step, the yardstick's, lightly's if installed, and the matrix rate.

    All take turns within one run and the median counts; each lives in a process of its own. Where
    another than the product's fails (mostly for memory), a line says so and the others go on.

    Args:
        settings: `model`, `method`, `data`, `trainer` as for training, `batch_size`, `rounds`,
            `chunk_size`, `compile`, `against`.
        console: where the tables are shown.

    Returns:
        Rows with name (msn, eager_yardstick, lightly, matmul_limit), s_per_step, images_per_s,
        flops_per_s (nominal, see `msn.training.cost`), share_of_limit, peak_bytes (beyond the
        loaded libraries; None where the system does not tell), first_step_s, the settings that
        the numbers hang on (precision is each row's own), and of msn parts.

    Raises:
        UserError: a setting is wrong, or msn itself could not be measured.
    """
    case = case_of(settings)
    names = [name for name in available() if name == "msn" or name in settings["against"]]
    seconds, rates, facts = _take_turns(names, case, settings["rounds"], console)
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
    _check_whole("batch_size", batch, 2)
    _check_whole("rounds", settings["rounds"], 1)
    if settings["chunk_size"] is not None:
        _check_whole("chunk_size", settings["chunk_size"], 1)
    compilation(settings["compile"])
    against = settings["against"]
    if not isinstance(against, list) or any(name not in _COMPARISONS for name in against):
        raise UserError(
            f"against={against}: allowed are [{', '.join(_COMPARISONS)}], one of them, or [] for "
            "neither"
        )
    ViewSettings(**take("data.views", settings["data"]["views"], ViewSettings))
    return Case(
        model=settings["model"],
        method=settings["method"],
        views=settings["data"]["views"],
        batch_size=batch,
        chunk_size=settings["chunk_size"],
        compile=settings["compile"],
        precision=resolve_precision(settings["trainer"]["precision"], "auto"),
        device=device,
    )


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be a whole number >= {least}, got {value!r}")


def _take_turns(
    names: list[str], case: Case, rounds: int, console: Console
) -> tuple[dict[str, list[float]], list[float], dict[str, dict[str, Any]]]:
    """Seconds a step and the matrix rate of every round, and what is measured once."""
    device, dtype = torch.device(case.device), product_type(case.precision)
    if device.type == "cuda":
        measure_matrix_rate(device, dtype)  # takes its memory before the methods fill the device
    workers: dict[str, Worker] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    facts, rates, parts = {}, [], []
    try:
        for name in names:
            workers[name] = Worker(name, case)
            with _left_out_if_it_fails(name, workers, console):
                facts[name] = _warm_up(name, workers[name], device)
        for _ in range(rounds):
            rates.append(measure_matrix_rate(device, dtype))
            for name, worker in list(workers.items()):
                with _left_out_if_it_fails(name, workers, console):
                    seconds[name].append(worker.ask("steps", facts[name]["repeats"]))
            parts.append(workers["msn"].ask("parts"))
        facts["msn"]["compiled"] = workers["msn"].ask("compiled")
        facts["msn"]["parts"] = {
            name: statistics.median(part[name] for part in parts) for name in PARTS
        }
        return {name: seconds[name] for name in workers}, rates, facts
    finally:
        for worker in workers.values():
            worker.close()


@contextmanager
def _left_out_if_it_fails(
    name: str, workers: dict[str, Worker], console: Console
) -> Iterator[None]:
    """Go on without a comparison that fails; without msn there is nothing to compare."""
    try:
        yield
    except MethodFailed as error:
        if name == "msn":
            raise
        console.print(f"left out: {error}", markup=False, soft_wrap=True)
        workers.pop(name).close()


def _warm_up(name: str, worker: Worker, device: torch.device) -> dict[str, Any]:
    """Steps before any is timed, and what the first ones tell."""
    first = [worker.ask("steps") for _ in range(_WARM_UP)]
    # Steps have reached their full size; the parts below make views, which is other memory.
    peak = worker.ask("peak_bytes")
    if name == "msn":
        worker.ask("parts")  # and has all its memory before the others take theirs
    return {"first_step_s": first[0], "peak_bytes": peak, "repeats": _repeats(first[-1], device)}


def _repeats(seconds: float, device: torch.device) -> int:
    return 1 if device.type != "cuda" else max(1, round(_CUDA_SECONDS / seconds))


def _rows(
    case: Case, seconds: dict[str, list[float]], rate: float, facts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    flops = step_flops(case).total
    common = {
        "batch_size": case.batch_size,
        "device": device_name(case),
        "model": case.model,
        "patch_drop": case.method["patch_drop"],
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
                **{key: value for key, value in facts[name].items() if key != "repeats"},
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
