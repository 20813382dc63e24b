"""Check the settings of a plan as training does, and count the devices."""

import os
from typing import Any

import torch

from msn.data.views import ViewSettings
from msn.errors import UserError
from msn.schema import take
from msn.training.launch import read_launch
from msn.training.trainer import build_trainer

_GPU = ("gpu", "cuda")


def check_settings(settings: dict[str, Any]) -> None:
    """Check the settings of a plan that neither module nor data module checks.

    Raises:
        UserError: if a value has a wrong type or is out of range, or the speed is not given and
            cannot be measured here.
    """
    for key in ("planning", "trainer", "data"):
        if not isinstance(settings[key], dict):
            raise UserError(f"{key} must be a group of keys, got {settings[key]!r}")
    check_trainer(settings["trainer"])
    for key in ("max_epochs", "num_nodes", "limit_train_batches"):
        _check_positive(f"trainer.{key}", settings["trainer"][key])
    _check_planning(**take("planning", settings["planning"], _check_planning))
    batch_size = settings["data"]["global_batch_size"]
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"data.global_batch_size must be a whole number >= 1, got {batch_size!r}")
    take("data.views", settings["data"]["views"], ViewSettings)
    device = planned_device(settings["trainer"]["accelerator"])
    here = device.type == "cpu" or torch.cuda.is_available()
    if not here and settings["planning"]["rate"] is None:
        raise UserError(
            "planning.rate must be given, e.g. planning.rate=3.5e14 for ViT-B on an H100, 2.1e14 "
            "for ViT-S: there is no GPU here to measure"
        )


def check_trainer(trainer: dict[str, Any]) -> None:
    """Check the types of the trainer's settings.

    Raises:
        UserError: if a value has a wrong type.
    """
    take("trainer", trainer, build_trainer, derived=("callbacks", "loggers", "run_dir"))


def _check_planning(*, rate: float | None, memory: float | None, images: int | None) -> None:
    _check_positive("planning.rate", rate)
    _check_positive("planning.memory", memory)
    _check_positive("planning.images", images)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise UserError(f"{name} must be > 0, got {value}")


def planned_device(accelerator: str) -> torch.device:
    """The kind of device that a training is planned for; a GPU need not be here.

    Args:
        accelerator: `trainer.accelerator`.
    """
    on_cuda = accelerator in _GPU or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_cuda else "cpu")


def count_processes(trainer: dict[str, Any], device: torch.device) -> int:
    """Number of processes of the training, started already or by the trainer.

    Raises:
        UserError: if `trainer.devices` is not a number of devices.
    """
    launch = read_launch(os.environ)
    nodes = trainer["num_nodes"] if launch is None else launch.nodes
    devices = _read_devices(trainer["devices"])
    if devices == "auto" and launch is not None:
        return nodes * launch.processes_per_node
    if device.type == "cpu":
        if isinstance(devices, list) or devices == -1:
            raise UserError(
                f"trainer.devices={devices}: on the CPU it must be auto or a whole number >= 1"
            )
        return nodes * (1 if devices == "auto" else int(devices))
    if devices in ("auto", -1):
        return nodes * max(1, torch.cuda.device_count())  # one, if no GPU is here
    return nodes * (len(devices) if isinstance(devices, list) else int(devices))


def _read_devices(devices: int | str | list[int]) -> int | str | list[int]:
    """As Lightning reads them: "auto", -1 (all), a number >= 1 or a list, also given as text.

    Raises:
        UserError: if they are something else.
    """
    read: int | str | list[int] = devices
    if isinstance(devices, str) and devices != "auto":
        parts = [part.strip() for part in devices.split(",") if part.strip()]
        if all(part.removeprefix("-").isdecimal() for part in parts):
            numbers = [int(part) for part in parts]
            read = numbers if "," in devices or not numbers else numbers[0]
    is_number = isinstance(read, int) and (read >= 1 or read == -1)
    if read == "auto" or is_number or (isinstance(read, list) and read):
        return read
    raise UserError(
        f"trainer.devices={devices}: must be auto, -1 (all), a whole number >= 1 or a list of GPUs"
    )
