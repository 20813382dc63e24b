"""The matrix rate of a device: what a step's FLOP/s are measured against (MFU)."""

import time

import torch

_SECONDS_A_TRY, _TRIES = 0.25, 3
# A CPU without bfloat16 may take minutes for the product of a full size.
_LONGEST_PRODUCT, _LEAST_SIDE = 1.0, 256


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on this device, now.

    Takes about a second, six where products are very slow; their size is smaller then. The best of
    a few tries counts: other programs only ever slow it down.

    Args:
        device: where the product is taken, with as many threads as torch uses there.
        dtype: of the factors; under autocast, what autocast computes in.
    """
    side = 8192
    if device.type == "cpu":
        side = _LEAST_SIDE
        while side < 2048 and 8 * side**3 * 2 / _rate(device, dtype, side, 0.0) < _LONGEST_PRODUCT:
            side *= 2
    return max(_rate(device, dtype, side, _SECONDS_A_TRY) for _ in range(_TRIES))


def _rate(device: torch.device, dtype: torch.dtype, side: int, least_seconds: float) -> float:
    own = torch.Generator(device)  # a resumed run measures again and must draw nothing of the run's
    left, right = (
        torch.randn(side, side, device=device, dtype=dtype, generator=own) for _ in range(2)
    )
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    synchronise(device)
    products, start = 0, time.perf_counter()
    while True:
        torch.mm(left, right, out=out)
        synchronise(device)
        products += 1
        seconds = time.perf_counter() - start
        if seconds >= least_seconds:
            return 2 * side**3 * products / seconds


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; for timing, never within a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
