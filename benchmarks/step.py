"""The product's training step beside plain ones and the machine's limit, in turns.

    python benchmarks/step.py [json=FILE] [against=[eager_yardstick,lightly]] [key=value ...]

Further keys are those of `msn bench what=step`: experiment=NAME, batch_size=, rounds=, ...
Methods: msn, eager_yardstick (benchmarks/yardstick.py), lightly (where it is installed); of an
experiment with method=mae: msn and against=[transformers]. Each has a process of its own; medians
count.
"""

import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.lightly_step import LightlyStep
from benchmarks.script import run_script
from benchmarks.step_worker import MethodFailed, Worker
from benchmarks.yardstick import Numbers, Yardstick
from msn.commands.step import (
    WARM_UP,
    Case,
    Step,
    TrainingStep,
    case_of,
    median_parts,
    product_type,
    random_views,
    repeats_of,
    show_step,
    step_rows,
)
from msn.errors import UserError
from msn.training.cost import measure_matrix_rate

COMPARISONS = ("eager_yardstick", "lightly", "transformers")


class YardstickStep:
    """`benchmarks/yardstick.py`, eager and in float32, whatever the product does."""

    def __init__(self, case: Case) -> None:
        method, device = case.method, torch.device(case.device)
        self.model = Yardstick(
            model=case.model, head=method["head"], num_prototypes=method["num_prototypes"]
        ).to(device)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.optimizer = self.model.train().build_optimizer()
        self.numbers = Numbers(
            lr=method["lr"],
            weight_decay=method["weight_decay"],
            momentum=method["momentum"],
            temperature=method["temperature"],
            sharpen_temperature=method["sharpen_temperature"],
            sinkhorn_iterations=method["sinkhorn_iterations"] if method["use_sinkhorn"] else 0,
            me_max_weight=method["me_max_weight"],
            clip_grad_norm=method["clip_grad_norm"] or float("inf"),
        )
        self.views = random_views(case)
        side = self.views.rand.shape[-1] // case.model["patch_size"]
        kept = int(side**2 * (1 - method["patch_drop"]))
        self.kept = torch.randperm(side**2)[:kept].to(device)

    def step(self) -> None:
        """One plain step."""
        self.model.step(self.optimizer, self.views[:3], self.kept, self.numbers)


def lightly_step(case: Case) -> LightlyStep:
    """lightly's step, where it is installed."""
    views = random_views(case)[:3]
    return LightlyStep(case.model, case.method, views, torch.device(case.device))


def transformers_step(case: Case) -> Step:
    """transformers' step of masked autoencoders, where it is installed."""
    from benchmarks.transformers_step import TransformersStep  # an extra

    return TransformersStep(case)


# Travel by name to the processes, so each must be a class or function of a module.
METHODS: dict[str, Callable[[Case], Step]] = {
    "msn": TrainingStep,
    "eager_yardstick": YardstickStep,
    "lightly": lightly_step,
    "transformers": transformers_step,
}


def run(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Measure the product's step, the yardstick's, lightly's if installed, and the matrix rate.

    All take turns within one run and the median counts; each lives in a process of its own. Where
    another than the product's fails (mostly for memory), a line says so and the others go on.

    Args:
        settings: of `msn.commands.step.bench_step`, and `against`.
        console: where the tables are shown.

    Returns:
        The rows of `msn.commands.step.step_rows`.

    Raises:
        UserError: a setting is wrong, or msn itself could not be measured.
    """
    case, against = case_of(settings), settings["against"]
    if not isinstance(against, list) or any(name not in COMPARISONS for name in against):
        raise UserError(
            f"against={against}: allowed are [{', '.join(COMPARISONS)}], one of them, or [] for "
            "neither"
        )
    kind = case.method.get("kind")
    names = ["msn", *(name for name in available(kind) if name in against)]
    seconds, rates, facts = _take_turns(names, case, settings["rounds"], console)
    rows = step_rows(case, seconds, statistics.median(rates), facts)
    show_step(rows, case, console)
    return rows


def available(kind: str | None = None) -> list[str]:
    """Comparisons of a method that can be measured here; None is MSN."""
    others, plain = ("transformers", []) if kind == "mae" else ("lightly", ["eager_yardstick"])
    return [*plain, *([others] if importlib.util.find_spec(others) else [])]


def _take_turns(
    names: list[str], case: Case, rounds: int, console: Console
) -> tuple[dict[str, list[float]], list[float], dict[str, dict[str, Any]]]:
    """Seconds per step and the matrix rate of every round, and what is measured once."""
    device, dtype = torch.device(case.device), product_type(case.precision)
    if device.type == "cuda":
        measure_matrix_rate(device, dtype)  # takes its memory before the methods fill the device
    workers: dict[str, Worker] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    facts, repeats, rates, parts = {}, {}, [], []
    try:
        for name in names:
            workers[name] = Worker(name, METHODS[name], case)
            with _left_out_if_it_fails(name, workers, console):
                facts[name], last = _warm_up(name, workers[name])
                repeats[name] = repeats_of(last, device)
        for _ in range(rounds):
            rates.append(measure_matrix_rate(device, dtype))
            for name, worker in list(workers.items()):
                with _left_out_if_it_fails(name, workers, console):
                    seconds[name].append(worker.ask("steps", repeats[name]))
            parts.append(workers["msn"].ask("parts"))
        facts["msn"]["compiled"] = workers["msn"].ask("compiled")
        facts["msn"]["parts"] = median_parts(parts)
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


def _warm_up(name: str, worker: Worker) -> tuple[dict[str, Any], float]:
    """Take steps before any is timed: what the first ones tell, and the seconds of the last."""
    first = [worker.ask("steps") for _ in range(WARM_UP)]
    # Steps have reached their full size; the parts below make views, which is other memory.
    peak = worker.ask("peak_bytes")
    if name == "msn":
        worker.ask("parts")  # and has all its memory before the others take theirs
    return {"first_step_s": first[0], "peak_bytes": peak}, first[-1]


def main() -> None:
    """Run with the settings of the command line."""
    run_script(run, {"against": list(COMPARISONS)}, what="step")


if __name__ == "__main__":
    main()
