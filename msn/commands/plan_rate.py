"""The speed in a plan: operations a second in a few steps on this machine."""

import time
from collections.abc import Callable

import torch

from msn.commands.step import Case, MsnStep, product_type
from msn.errors import UserError
from msn.training.cost import Flops, Memory, measure_matrix_rate, synchronise

_MEASURED_BATCH = {"cpu": 8, "cuda": 64}
_LEAST_BATCH = 2  # BatchNorm wants two
_LONGEST_STEP = 20.0  # s; a step that would take longer is measured with the least batch
_HINT = "planning.rate=OPERATIONS_A_SECOND, e.g. planning.rate=4e14, is a plan without measuring"


def measure_rate(
    case: Case, flops: Flops, forecast: Callable[[Case], Memory], room: float
) -> tuple[float, int]:
    """Operations/s of one device of this machine in training steps.

    Args:
        case: what the training will be, on a device that is here.
        flops: of one image.
        forecast: of a case that trains alone.
        room: bytes that a step may take.

    Returns:
        The rate, and the images of the steps that were measured.

    Raises:
        UserError: if no batch fits, by forecast or by trial.
    """
    device = torch.device(case.device)
    batch = _batch_that_fits(case, forecast, room)
    try:
        limit = measure_matrix_rate(device, product_type(case.precision))
        if batch * flops.total / limit > _LONGEST_STEP:
            batch = _LEAST_BATCH
        seconds = _seconds_a_step(case._replace(batch_size=batch), device)
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


def _seconds_a_step(case: Case, device: torch.device) -> float:
    method = MsnStep(case)
    seconds = []
    for _ in range(3):  # the first compiles and warms up
        start = time.perf_counter()
        method.step()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
