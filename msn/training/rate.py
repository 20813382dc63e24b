"""The matrix rate of a device: what a step's FLOP/s are measured against (MFU)."""

import time

import torch

_SECONDS_A_TRY, _TRIES = 0.25, 3


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on this device, now.

    Takes about a second. The best of a few tries counts: other programs only ever slow it down.

    Args:
        device: where the product is taken, with as many threads as torch uses there.
        dtype: of the factors; under autocast, what autocast computes in.
    """
    side = 2048 if device.type == "cpu" else 8192
    own = torch.Generator(device)  # a resumed run measures again and must draw nothing of the run's
    left, right = (
        torch.randn(side, side, device=device, dtype=dtype, generator=own) for _ in range(2)
    )
    out = torch.empty_like(left)
    best = 0.0
    for _ in range(_TRIES):
        torch.mm(left, right, out=out)
        synchronise(device)
        products, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < _SECONDS_A_TRY:
            torch.mm(left, right, out=out)
            synchronise(device)
            products += 1
        best = max(best, 2 * side**3 * products / seconds)
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; for timing, never within a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
