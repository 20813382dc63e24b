"""How fast, and how exactly, logistic regression is solved.

    python benchmarks/logistic.py [features=FILE] [json=FILE] [n=12811 d=384 classes=1000 ...]

Objective and gradient are computed afresh in float64.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.script import run_script
from msn.commands.eval_lowshot import choose_device
from msn.errors import UserError
from msn.evaluation.logistic import fit_logistic
from msn.schema import whole_number
from msn.weights.tensors import open_weights

DEFAULTS = {
    "features": None,  # safetensors with x [n, d] and y [n], solved as they are; None: made up
    "lambd": 0.075,  # lambda * n
    "n": 12811,  # of made-up unit rows, as d, classes and seed
    "d": 384,
    "classes": 1000,
    "seed": 0,
    "tolerance": 1e-6,  # certified relative distance of the objective from its optimum
    "max_evaluations": 2000,
    "device": "cpu",
}
_BLOCK = 2**22  # numbers of scores held at once while checking


def run(config: Mapping[str, Any], console: Console) -> list[dict[str, Any]]:
    """Solve given or made-up rows once and print objective, gradient norm, seconds, passes.

    Args:
        config: the keys of `DEFAULTS`.
        console: where the table is shown.

    Raises:
        UserError: if a setting or a file is wrong.
    """
    _check(config)
    device = choose_device(str(config["device"]))
    if device.type == "mps":
        raise UserError("device=mps has no float64, in which optima are proven: use device=cpu")
    rows, labels = _problem(config)
    rows, labels = rows.to(device), labels.to(device)
    num_classes, strength = int(labels.max()) + 1, float(config["lambd"]) / len(rows)
    begin = time.perf_counter()
    fit = fit_logistic(
        rows.unsqueeze(0),
        labels.unsqueeze(0),
        num_classes=num_classes,
        lambdas=[strength],
        tolerance=float(config["tolerance"]),
        max_evaluations=int(config["max_evaluations"]),
    )
    seconds = time.perf_counter() - begin  # the results above are on the host already
    objective, norm = check(rows, labels, fit.weight[0, 0], strength)
    found = {
        "name": "logistic",
        "n": len(rows),
        "d": rows.shape[1],
        "classes": num_classes,
        "lambda": strength,
        "objective": objective,
        "gradient_norm": norm,
        "certified_relative_gap": norm**2 / (2 * strength) / objective,
        "seconds": seconds,
        "iterations": int(fit.evaluations[0, 0]),
        "converged": bool(fit.converged.all()),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    table = Table(title="L2-regularised multinomial logistic regression", show_header=False)
    for name, value in found.items():
        table.add_row(name, f"{value:.10g}" if isinstance(value, float) else str(value))
    console.print(table)
    return [found]


def check(rows: Tensor, labels: Tensor, weight: Tensor, strength: float) -> tuple[float, float]:
    """Objective and gradient norm in float64, written from the definition.

    Args:
        rows: [n, d].
        labels: [n].
        weight: [C, d].
        strength: lambda of the mean loss.
    """
    weight = weight.double()
    loss, gradient = 0.0, torch.zeros_like(weight)
    step = max(1, _BLOCK // len(weight))
    for part, wanted in zip(rows.split(step), labels.split(step), strict=True):
        x = part.double()
        scores = x @ weight.T
        loss += float(F.cross_entropy(scores, wanted, reduction="sum"))
        residual = scores.softmax(dim=1)
        residual[torch.arange(len(x)), wanted] -= 1
        gradient += residual.T @ x
    objective = loss / len(rows) + strength / 2 * float(weight.square().sum())
    return objective, float((gradient / len(rows) + strength * weight).norm())


def _check(config: Mapping[str, Any]) -> None:
    for key in ("lambd", "tolerance"):
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{key}={value}: must be a number > 0")
    for key, least in (("seed", 0), ("max_evaluations", 1)):
        whole_number(key, config[key], least)


def _problem(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    if config["features"] is not None:
        return _read(Path(str(config["features"])))
    sizes = {key: whole_number(key, config[key], 2) for key in ("n", "d", "classes")}
    generator = torch.Generator().manual_seed(config["seed"])
    rows = torch.randn(sizes["n"], sizes["d"], generator=generator)
    return F.normalize(rows, dim=1), torch.arange(sizes["n"]) % sizes["classes"]


def _read(path: Path) -> tuple[Tensor, Tensor]:
    tensors, _ = open_weights(path)
    if set(tensors) < {"x", "y"}:
        raise UserError(f"features={path}: needs tensors x [n, d] and y [n], has {sorted(tensors)}")
    rows, labels = tensors["x"], tensors["y"]
    if rows.ndim != 2 or labels.shape != rows.shape[:1] or not rows.is_floating_point():
        shapes = f"x {list(rows.shape)} and y {list(labels.shape)}"
        raise UserError(f"features={path}: x must be [n, d] floats and y [n], got {shapes}")
    if labels.is_floating_point():
        raise UserError(f"features={path}: y must be whole numbers, got {labels.dtype}")
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows, labels.long()


def main() -> None:
    """Run with the settings of the command line."""
    run_script(run, DEFAULTS)


if __name__ == "__main__":
    main()
