"""The measured matrix rate is that of products actually taken."""

import pytest
import torch

from msn.training import cost as rate


class Machine:
    """A clock that products move on, each by its operations over a rate."""

    def __init__(self, monkeypatch, operations_per_second):
        self.now, self.sides = 0.0, []
        self._rate = operations_per_second
        monkeypatch.setattr(rate.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(rate.torch, "mm", self._mm)

    def _mm(self, left, right, out):
        self.sides.append(len(left))
        self.now += 2 * len(left) ** 3 / self._rate


@pytest.mark.parametrize(("true", "side"), [(1e12, 2048), (5e10, 2048), (2e9, 512), (1e8, 256)])
def test_rate_is_operations_over_seconds_and_is_found_in_seconds(monkeypatch, true, side):
    machine = Machine(monkeypatch, true)
    got = rate.measure_matrix_rate(torch.device("cpu"), torch.bfloat16)
    assert got == pytest.approx(true)
    assert machine.sides[-1] == side
    assert machine.now < 10
