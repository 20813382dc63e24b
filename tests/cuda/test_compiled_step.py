"""Steps with compiled blocks on the fake device: no break, nothing compiled after the first."""

import pytest
import torch
from torch._dynamo.utils import counters

from msn.commands.step import TrainingStep
from msn.method.block import Block
from tests.cuda.conftest import case

pytestmark = pytest.mark.slow


def check_compiled_step(gpu, made, graphs):
    from tests.cuda.fake_triton import fake_inductor

    torch._dynamo.reset()
    counters.clear()
    gpu.strict = False
    with fake_inductor(gpu):
        method = TrainingStep(made._replace(compile=True))
        assert method.compiled
        for step in range(3):
            gpu.reset()
            gpu.strict = step > 0
            method.step()
            assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    written = [launch for launch in gpu.launches if launch.name.startswith("triton_")]
    assert written
    assert all(launch.moved > 0 for launch in written)
    torch._dynamo.reset()
    return method


def test_compiled_blocks_break_nowhere(gpu):
    check_compiled_step(gpu, case(depth=3), graphs=4)


def test_compiled_blocks_of_trunk_and_decoder_break_nowhere(gpu):
    check_compiled_step(gpu, case("mae_vitb16", depth=3), graphs=2)


ATTEND = Block._attend_from_class


def break_the_graph(self, normed, turn):
    torch._dynamo.graph_break()
    return ATTEND(self, normed, turn)


def compile_again(self, normed, turn):
    self.calls = getattr(self, "calls", 0) + 1  # a number that compiled code takes for fixed
    return ATTEND(self, normed, turn) * self.calls


@pytest.mark.parametrize("wrong", [break_the_graph, compile_again])
def test_the_check_sees(gpu, monkeypatch, wrong):
    monkeypatch.setattr(Block, "_attend_from_class", wrong)
    with pytest.raises(AssertionError, match="== 4"):
        check_compiled_step(gpu, case(), graphs=4)
