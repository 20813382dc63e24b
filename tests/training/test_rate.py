"""The measured matrix rate is that of products actually taken."""

import pytest
import torch

from msn.training import rate


def test_rate_is_operations_over_seconds(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(rate.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(rate, "_SECONDS_A_TRY", 3.5)
    taken = []
    monkeypatch.setattr(rate.torch, "mm", lambda left, right, out: taken.append(left.shape))
    # A tick of the clock a product: three products fit, and four seconds have passed by then.
    got = rate.measure_matrix_rate(torch.device("cpu"), torch.float32)
    assert got == pytest.approx(2 * 2048**3 * 3 / 4)
    assert len(taken) == 3 * (1 + 3)
