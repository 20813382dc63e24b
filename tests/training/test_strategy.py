"""Compiled blocks: same numbers, same names, no recompilation from step to step."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from msn.commands.entry import build, compose
from msn.errors import UserError
from msn.method.masking import PatchDrop, draw_key
from msn.method.network import MSN
from msn.training.strategy import DDP_OPTIONS, compilation, compile_blocks, make_fast
from tests.conftest import SMALL_HEAD, SMALL_MODEL

MODERN = {"position": "rope", "mlp": "swiglu", "layer_scale": 0.1, "registers": 2}


def network(**options):
    torch.manual_seed(0)
    model = {**SMALL_MODEL, "depth": 4, **options}
    return MSN(model=model, head=SMALL_HEAD, num_prototypes=10).double()


def gradients(msn, step, chunk_size=None):
    """Projections and gradients of one step with its own patch mask."""
    generator = torch.Generator().manual_seed(step)
    shapes = [(4, 3, 16, 16), (1, 4, 3, 16, 16), (3, 4, 3, 8, 8)]
    views = [torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drop = PatchDrop(patch_drop=0.3, patch_drop_scope="batch")
    kept = drop.draw(16, rand_views=1, images=range(4), global_batch_size=4, key=draw_key(0, step))
    out = msn(*views, kept, chunk_size)
    msn.zero_grad()
    (out.anchor.square().sum() + out.target.sum()).backward()
    return [out.anchor.detach(), out.target, *(p.grad for p in msn.anchor.parameters())]


@pytest.mark.parametrize("options", [{}, MODERN])
def test_compiled_blocks_give_plain_numbers_under_plain_names_and_compile_once(options):
    plain, compiled = network(**options), network(**options)
    names = list(compiled.state_dict())
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(compiled, backend="aot_eager")
    graphs = []
    for step in range(4):
        for ours, theirs in zip(gradients(compiled, step), gradients(plain, step), strict=True):
            assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    # Anchor and target, each with full blocks and with class tokens alone, and all blocks alike.
    assert graphs == [4, 4, 4, 4]
    assert sum(counters["graph_break"].values()) == 0
    assert list(compiled.state_dict()) == names
    assert not any("_orig_mod" in name for name in names)
    _evaluating_compiles_nothing(compiled)
    torch._dynamo.reset()


# The last chunk of three images and one has graphs of its own; torch gives up after eight.
@pytest.mark.parametrize(("chunk_size", "graphs"), [(2, 4), (3, 8)])
def test_compiled_blocks_give_plain_numbers_in_chunks_and_compile_once(chunk_size, graphs):
    plain, compiled = network(), network()
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(compiled, backend="aot_eager")
    for step in range(3):
        chunked = gradients(compiled, step, chunk_size)
        for ours, theirs in zip(chunked, gradients(plain, step), strict=True):
            assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def _evaluating_compiles_nothing(compiled):
    """Feature extraction meets batches of other sizes."""
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for batch in (1, 2, 3):
            images = torch.rand(batch, 3, 16, 16, dtype=torch.float64)
            compiled.target.trunk.forward_features(images, norm=True)
    assert counters["stats"]["unique_graphs"] == before


def test_compile_is_true_false_or_auto():
    assert compilation("auto") is None
    assert compilation(True) is True
    with pytest.raises(UserError, match="true, false or auto"):
        compilation("yes")


@pytest.mark.parametrize(("device", "missing"), [("cpu", "C++ compiler"), ("cuda", "C compiler")])
def test_without_a_compiler_training_goes_on(monkeypatch, caplog, device, missing):
    monkeypatch.setenv("PATH", "/nowhere")
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    with caplog.at_level("INFO", logger="msn"):
        wanted = None if device == "cuda" else True
        device = torch.device(device)
        assert make_fast(network(), device, wanted=wanted) is False
    assert f"no {missing}" in caplog.text


def test_without_triton_training_on_cuda_goes_on(monkeypatch, caplog):
    monkeypatch.setattr("msn.compilers.importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO", logger="msn"):
        assert make_fast(network(), torch.device("cuda"), wanted=None) is False
    assert "no Triton" in caplog.text


def test_without_python_s_headers_training_on_cuda_goes_on(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr("msn.compilers.sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with caplog.at_level("INFO", logger="msn"):
        assert make_fast(network(), torch.device("cuda"), wanted=None) is False
    assert "no Python.h" in caplog.text


class _Wrapped(torch.nn.Module):
    def __init__(self, msn):
        super().__init__()
        self.msn = msn

    def forward(self, *views):
        return self.msn(*views, None)


def test_ddp_cuts_no_block_s_graph_at_its_buckets(tmp_path):
    """A block here has 7 MB of weights, DDP's first bucket 1 MiB."""
    model = {**SMALL_MODEL, "embed_dim": 384, "depth": 3}
    msn, calls = MSN(model=model, head=SMALL_HEAD, num_prototypes=10), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    torch._dynamo.reset()
    compile_blocks(msn, backend=backend)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(_Wrapped(msn), **DDP_OPTIONS)
        out = wrapped(
            *(torch.rand(*n, 2, 3, 16, 16) for n in ((), (1,))), torch.rand(3, 2, 3, 8, 8)
        )
        out.anchor.sum().backward()
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    assert len(calls) == 4


def test_ddp_has_no_copy_of_the_gradients_and_sends_no_buffers(tmp_path):
    config = compose("train", ["trainer.accelerator=cpu", "trainer.devices=2"])
    trainer = build(config, "trainer", callbacks=[], loggers=[], run_dir=str(tmp_path))
    assert isinstance(trainer.strategy, DDPStrategy)
    assert vars(trainer.strategy)["_ddp_kwargs"].items() >= DDP_OPTIONS.items()
    assert set(DDP_OPTIONS.values()) == {True, False}
