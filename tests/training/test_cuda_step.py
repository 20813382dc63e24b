"""On CUDA: the step never waits for the device, and takes the memory that was forecast."""

import pytest
import torch

from msn.commands.entry import compose, to_plain
from msn.commands.step import TrainingStep, case_of
from msn.data.views import ViewSettings
from msn.training.cost import forecast_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def case(**changes):
    return case_of(to_plain(compose("bench", ["what=step"])))._replace(**changes)


def test_no_host_synchronisation_in_a_compiled_step():
    method = TrainingStep(case(batch_size=16))
    for _ in range(3):
        method.step()
    assert method.compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("batch_size", "chunk_size"), [(128, None), (256, 32)])
def test_the_forecast_is_within_15_percent_of_the_peak(batch_size, chunk_size):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    measured = case(batch_size=batch_size, chunk_size=chunk_size)
    method = TrainingStep(measured)
    for _ in range(2):
        method.step()
    forecast = forecast_memory(
        method.module.network,
        ViewSettings(**measured.views),
        batch_size=batch_size,
        chunk_size=chunk_size,
        patch_drop=measured.method["patch_drop"],
        precision=measured.precision,
    )
    assert forecast.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)
