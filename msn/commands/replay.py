"""`python -m msn replay dump=FILE`: take the step again that stopped a run."""

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from msn.commands.entry import to_plain
from msn.errors import UserError
from msn.training.guard import Reproduction, reproduce

_NAMED = 20


def run(config: DictConfig) -> None:
    """Replay a dump and say what is not finite and where first; exit code 1 if everything is.

    Raises:
        UserError: if the dump is missing, damaged or none, or the device is not there.
    """
    settings = to_plain(config)
    found = reproduce(
        Path(settings["dump"]),
        device=_device(settings["device"]),
        chunk_size=settings["chunk_size"],
    )
    print(f"step {found.step}: epoch {found.epoch}, batch {found.batch}")
    for rank, (loss, norm) in enumerate(found.recorded):
        print(f"then, process {rank}: loss {loss:g}, gradient norm {norm:g}")
    print(f"now, all joined:  loss {found.loss:g}, gradient norm {found.grad_norm:g}")
    if found.finite:
        print(
            "not reproduced: every number is finite here; another device, another precision, or a "
            "defect of the machine that ran it"
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


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"device must be one of auto, cpu, cuda, mps, got {name}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: there is no CUDA device here")
    return torch.device(name)
