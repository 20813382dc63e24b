"""The program for a day on a GPU, in small on the fake device."""

import json
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu_day

PARTS = ["step_b16_1024", "trace", "views", "equal", "features"]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_each_part_runs_on_the_device(gpu, monkeypatch, part):
    from tests.cuda.fake_triton import fake_inductor

    host = partial(profile, activities=[ProfilerActivity.CPU])
    monkeypatch.setattr(gpu_day, "profile", lambda activities: host())
    monkeypatch.setattr(gpu_day, "SMALL", True)
    monkeypatch.setattr(gpu_day, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", gpu.reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.peak)
    gpu.strict = False
    torch._dynamo.reset()
    with fake_inductor(gpu):
        result = gpu_day.PARTS[part][0]()
    assert json.loads(json.dumps(result))
    assert gpu.launches
    if part.startswith("step"):
        assert result["compiled"]
        assert result["peak_gib"] == pytest.approx(result["forecast_gib"], rel=0.2)
