"""`python -m msn verify`: replay reference figures on this machine and print every difference."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

import msn
from msn.commands.entry import to_plain
from msn.method.replay import ATOL, ATOL_ZERO_GRADIENT, RTOL, Difference, load_golden, replay


def run(config: DictConfig) -> None:
    """Replay `golden` in float64 on the CPU; exit code 1 when a figure is out of tolerance.

    Raises:
        UserError: if the file is missing, damaged or of another layout.
    """
    settings = to_plain(config)
    shipped = Path(msn.__file__).parent / "golden" / "golden_default.safetensors"
    path = Path(settings["golden"] or shipped)
    with torch.random.fork_rng(devices=[]):
        differences = list(replay(load_golden(path)))
    console = Console()
    console.print(_table(differences if settings["all"] else worst_of_each_kind(differences)))
    failed = [difference for difference in differences if not difference.ok]
    console.print(
        f"{len(differences)} figures of {path.name}: {len(differences) - len(failed)} within "
        f"rtol {RTOL:g}, atol {ATOL:g} ({ATOL_ZERO_GRADIENT:g} where the true gradient is zero), "
        f"{len(failed)} out of tolerance"
    )
    if failed:
        sys.exit(1)


def worst_of_each_kind(differences: Iterable[Difference]) -> list[Difference]:
    """Per kind of figure (name without step number and parameter) the one closest to its limit."""
    worst: dict[str, Difference] = {}
    for difference in differences:
        parts = difference.name.split(".")
        kind = parts[-1] if parts[0].startswith("step") else ".".join(parts[:2])
        # A figure that is not a number compares as not ok and must win.
        if kind not in worst or not difference.excess <= worst[kind].excess:
            worst[kind] = difference
    return list(worst.values())


def _table(differences: Iterable[Difference]) -> Table:
    table = Table(title="Difference to the reference, float64")
    table.add_column("figure", overflow="fold")
    table.add_column("largest |difference|", justify="right", overflow="fold", min_width=8)
    table.add_column("share of its tolerance", justify="right", overflow="fold", min_width=8)
    for difference in differences:
        mark = "[green]ok[/green]" if difference.ok else "[red]OUT[/red]"
        name = f"{mark} {difference.name}"
        table.add_row(name, f"{difference.max_abs:.2e}", f"{difference.excess:.2e}")
    return table
