"""Forecast of a step's memory against what autograd keeps and what a process takes."""

import json
from itertools import accumulate

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_worker import Worker
from msn.commands.entry import compose, to_plain
from msn.commands.step import Case, TrainingStep, case_of
from msn.commands.verify import load_golden
from msn.data.views import ViewSettings
from msn.method.network import MSN
from msn.training import cost as rate
from msn.training.cost import forecast_memory, suggest_chunk_size
from msn.training.strategy import compile_blocks
from tests.conftest import GOLDEN
from tests.training.test_module import module_of

MODEL = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 4.0,
}
HEAD = {"hidden_dim": 64, "output_dim": 16, "use_batch_norm": True}
VIEWS = {
    "rand_views": 1,
    "focal_views": 4,
    "rand_size": 64,
    "focal_size": 32,
    "patch_size": 8,
    "rand_scale": [0.3, 1.0],
    "focal_scale": [0.05, 0.3],
    "ratio": [0.75, 1.33],
    "flip_probability": 0.5,
    "jitter_probability": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "gray_probability": 0.2,
    "blur_probability": 0.5,
    "blur_radius": [0.1, 2.0],
}


def kept_bytes(network, batch_size, precision="32-true"):
    """Bytes of all storages that the anchor's forward pass keeps, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # held, so that no address is used twice

    rand, focal = torch.rand(1, batch_size, 3, 64, 64), torch.rand(4, batch_size, 3, 32, 32)
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with half, saved_tensors_hooks(note, lambda tensor: tensor):
        out = network.project_anchors(rand, focal, torch.arange(48))
    assert out.requires_grad
    return sum(sizes.values())


def forecast_of(network, views=VIEWS, **changes):
    settings = {
        "batch_size": 4,
        "chunk_size": None,
        "patch_drop": 0.25,
        "precision": "32-true",
        **changes,
    }
    return forecast_memory(network, ViewSettings(**views), **settings)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_scale": 1e-5, "registers": 4, "class_position": False},
        {"layer_scale": 1e-5, "position": "rope", "mlp": "swiglu", "registers": 4},
    ],
)
def test_activations_are_those_that_autograd_keeps(options):
    network = MSN(model=MODEL | options, head=HEAD, num_prototypes=8)
    forecast = forecast_of(network)
    assert forecast.activations == pytest.approx(kept_bytes(network, 4), rel=0.05)


@pytest.mark.parametrize("mlp_ratio", [4.0, 2.0])
@pytest.mark.parametrize("compiled", [True, False])
def test_in_bf16_activations_are_those_that_autocast_and_the_compiler_s_partition_keep(
    compiled, mlp_ratio
):
    network = MSN(model={**MODEL, "mlp_ratio": mlp_ratio}, head=HEAD, num_prototypes=8)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(network, backend="aot_eager_decomp_partition")  # inductor's, without C++
    forecast = forecast_of(network, precision="bf16-mixed", compiled=compiled)
    kept = kept_bytes(network, 4, precision="bf16-mixed")
    assert forecast.activations == pytest.approx(kept, rel=0.03)


def test_views_are_made_in_half_precision_where_training_is():
    network = MSN(model=MODEL, head=HEAD, num_prototypes=8)
    assert forecast_of(network, precision="bf16-mixed").views == forecast_of(network).views / 2


def test_under_ddp_gradients_lie_in_its_buckets_all_the_time():
    network = MSN(model=MODEL, head=HEAD, num_prototypes=8)
    trained = 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    alone, together = forecast_of(network), forecast_of(network, processes=2)
    assert alone.gradients == trained
    assert together.gradients == trained
    assert together.peak == alone.peak + trained
    assert together == forecast_of(network, processes=8)


def test_a_cut_network_is_divided_but_for_what_is_whole_at_a_time():
    network = MSN(model=MODEL, head=HEAD, num_prototypes=8)
    alone = forecast_of(network)
    assert forecast_of(network, sharded=True) == alone
    block = 4 * sum(p.numel() for p in network.anchor.trunk.blocks[0].parameters())
    outside = alone.weights - 12 * block  # six blocks each of anchor and target
    trained_outside = alone.gradients - 6 * block
    for processes in (2, 8):
        cut = forecast_of(network, sharded=True, processes=processes)
        assert cut.optimiser == alone.optimiser / processes
        assert cut.weights == alone.weights / processes + outside + 2 * block
        assert cut.gradients == alone.gradients / processes + trained_outside + block
        assert cut.activations == alone.activations
    assert cut.peak < alone.peak


def vit_b16_of_12_gb(batch_size=1024, chunk_size=32):
    """The case that is promised for a card of 12 GB, as `bench what=step` measures it on CUDA."""
    settings = to_plain(compose("bench", ["what=step", "experiment=msn_vitb16"]))
    case = case_of({**settings, "batch_size": batch_size, "chunk_size": chunk_size})
    return case._replace(precision="bf16-mixed", device="cuda")


@pytest.mark.parametrize(("chunk_size", "fits"), [(32, True), (64, False)])
def test_vit_b16_with_1024_images_is_forecast_to_fit_12_gb_in_chunks_of_32(chunk_size, fits):
    case = vit_b16_of_12_gb(chunk_size=chunk_size)
    with torch.device("meta"):
        network = MSN(model=case.model, head=case.method["head"], num_prototypes=1024)
    forecast = forecast_of(
        network,
        case.views,
        batch_size=case.batch_size,
        chunk_size=case.chunk_size,
        patch_drop=case.method["patch_drop"],
        precision=case.precision,
    )
    assert (forecast.peak < 12e9) == fits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_of_vit_b16_with_1024_images_takes_less_than_12_gb():
    worker = Worker("msn", TrainingStep, vit_b16_of_12_gb())
    try:
        worker.ask("steps", 2)
        assert worker.ask("peak_bytes") < 12e9
    finally:
        worker.close()


def test_chunks_bound_activations_and_leave_the_rest():
    network = MSN(model=MODEL, head=HEAD, num_prototypes=8)

    def forecast(batch_size, chunk_size):
        return forecast_of(network, batch_size=batch_size, chunk_size=chunk_size)

    whole, chunked = forecast(64, None), forecast(64, 8)
    assert chunked[:4] == whole[:4]
    assert chunked.workspace == pytest.approx(whole.workspace / 8)
    assert chunked.peak < whole.peak / 2
    assert forecast(128, 8).workspace == chunked.workspace


def test_the_largest_chunk_that_fits_is_suggested():
    peaks = {None: 100.0, 1: 10.0, 2: 20.0, 4: 40.0}
    assert suggest_chunk_size(peaks, 100) is None
    assert suggest_chunk_size(peaks, 25) == 2
    with pytest.raises(ValueError, match="max"):
        suggest_chunk_size(peaks, 5)


def peak_of(folder, model, **changes):
    """Bytes that torch holds at most in two steps, and the forecast.

    What the process takes beyond them is the allocator's: it differs from run to run by a tenth.
    """
    settings = module_of(load_golden(GOLDEN["default"]).config).settings["method"]
    method = {**settings, "num_prototypes": 1024, "patch_drop": 0.15}
    method["head"] = {"hidden_dim": 2048, "output_dim": 256, "use_batch_norm": True}
    views = {**VIEWS, "focal_views": 10, "rand_size": 224, "focal_size": 96, "patch_size": 16}
    case = Case(
        **{
            "model": model,
            "method": method,
            "views": views,
            "batch_size": 8,
            "chunk_size": None,
            "compile": False,
            "precision": "32-true",
            "device": "cpu",
            **changes,
        }
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        method_step = TrainingStep(case)
        for _ in range(2):
            method_step.step()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    measured = max(accumulate(e["args"]["Bytes"] for e in events))  # freed bytes are negative
    with torch.device("meta"):
        network = MSN(model=model, head=method["head"], num_prototypes=1024)
    forecast = forecast_memory(
        network,
        ViewSettings(**views),
        batch_size=case.batch_size,
        chunk_size=case.chunk_size,
        patch_drop=0.15,
        precision="32-true",
    )
    return measured, forecast


@pytest.mark.slow
def test_a_batch_in_chunks_takes_the_memory_of_a_chunk_and_the_forecast_holds(tmp_path):
    """S/16 with four of its blocks, for time; batch 64 in chunks of 8 beside batch 8."""
    model = {
        "img_size": 224,
        "patch_size": 16,
        "embed_dim": 384,
        "depth": 4,
        "num_heads": 6,
        "mlp_ratio": 4.0,
    }
    small, small_forecast = peak_of(tmp_path, model)
    chunked, forecast = peak_of(tmp_path, model, batch_size=64, chunk_size=8)
    more_views = forecast.views - small_forecast.views
    assert chunked <= 1.1 * (small + more_views)
    assert small_forecast.peak == pytest.approx(small, rel=0.15)
    assert forecast.peak == pytest.approx(chunked, rel=0.15)


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
