"""The forecast of a step's memory against what the step allocates on the fake CUDA device."""

from contextlib import nullcontext

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param

from msn.commands.step import TrainingStep
from msn.data.views import ViewSettings
from msn.training.strategy import shard
from tests.cuda.conftest import case, one_of_eight


def check_forecast(gpu, made, rel=0.05, processes=1):
    from tests.cuda.fake_triton import fake_inductor

    torch._dynamo.reset()
    gpu.strict = False
    with fake_inductor(gpu) if made.compile else nullcontext():
        method = TrainingStep(made)
        if processes > 1:
            shard(method.module.network, init_device_mesh("cuda", (processes,)))
            method.optimizer = method.module.configure_optimizers()
        method.step()
        gpu.reset()
        method.step()
    forecast = method.module.forecast_memory(
        ViewSettings(**made.views),
        batch_size=made.batch_size,
        chunk_size=made.chunk_size,
        precision=made.precision,
        compiled=bool(made.compile),
        processes=processes,
        sharded=processes > 1,
    )
    assert forecast.peak == pytest.approx(gpu.peak, rel=rel)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_the_forecast_is_within_5_percent_of_a_small_step(gpu, precision, chunk_size):
    check_forecast(gpu, case(depth=3, batch_size=32, precision=precision, chunk_size=chunk_size))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_the_forecast_of_masked_autoencoders_is_within_10_percent(gpu, precision, chunk_size):
    made = case("mae_vitb16", depth=3, batch_size=32, precision=precision, chunk_size=chunk_size)
    check_forecast(gpu, made, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_forecast_is_within_5_percent_of_a_step_of_a_cut_network(gpu, monkeypatch, precision):
    for name in ("alloc_storage", "free_storage"):
        monkeypatch.setattr(_fsdp_param, name, gpu.resizing(getattr(_fsdp_param, name)))
    with one_of_eight(rank=0):
        check_forecast(gpu, case(depth=4, batch_size=16, precision=precision), processes=8)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_the_forecast_is_within_5_percent_of_a_step_with_a_stream_in_bf16(gpu, compiled):
    made = case(depth=6, batch_size=64, compile=compiled)
    check_forecast(gpu, made._replace(method={**made.method, "bf16_stream": True}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "batch_size", "chunk_size"),
    [
        ("mae_vitb16", 128, None),
        ("mae_vitl16", 64, 16),
        ("msn_vits16", 64, None),
        ("msn_vits16", 128, None),
        ("msn_vitb16", 128, None),
        ("msn_vitb16", 1024, 32),
        ("msn_vitl16", 64, None),
        ("msn_vitl7", 2, None),
        ("msn_vitl7", 16, None),
    ],
)
def test_the_forecast_is_within_5_percent_of_a_compiled_step(
    gpu, experiment, batch_size, chunk_size
):
    made = case(experiment, depth=None, batch_size=batch_size, chunk_size=chunk_size, compile=True)
    check_forecast(gpu, made, rel=0.1 if experiment.startswith("mae") else 0.05)
