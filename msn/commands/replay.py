"""`python -m msn replay dump=FILE`: repeat the step that stopped a run."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from msn.commands.entry import to_plain
from msn.commands.eval_lowshot import choose_device
from msn.training.guard import Reproduction, reproduce

_NAMED = 20


def run(config: DictConfig) -> None:
    """Repeat the step of a dump and print what is not finite; exit code 1 if everything is finite.

    Raises:
        UserError: if the dump is missing, damaged or not a dump, or the device is not available.
    """
    settings = to_plain(config)
    found = reproduce(
        Path(settings["dump"]),
        device=choose_device(settings["device"]),
        chunk_size=settings["chunk_size"],
    )
    print(f"step {found.step}: epoch {found.epoch}, batch {found.batch}")
    for rank, (loss, norm) in enumerate(found.recorded):
        print(f"then, process {rank}: loss {loss:g}, gradient norm {norm:g}")
    print(f"now, all joined:  loss {found.loss:g}, gradient norm {found.grad_norm:g}")
    if found.finite:
        print(
            "not reproduced: every number is finite here; the cause may be another device, another "
            "precision, or a defect of the machine that ran it"
        )
        sys.exit(1)
    for line in _findings(found):
        print(line)
    print("reproduced")


def _findings(found: Reproduction) -> list[str]:
    lines = []
    if found.weights:
        lines.append(f"weights not finite before the step: {_some(found.weights)}")
    if found.first is not None:
        lines.append(f"first module with an output that is not finite: {found.first}")
    if found.images:
        lines.append(f"images with projections that are not finite: {_some(found.images)}")
    return lines


def _some(names: list[str] | list[int]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(str(name) for name in names[:_NAMED]) + more
