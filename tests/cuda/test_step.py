"""The training step on the fake CUDA device: no wait, the types of mixed precision, its memory."""

import contextlib
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import scaling
from msn.commands.step import TrainingStep
from msn.method.distributed import BatchNorm, num_processes
from msn.method.loss import MSNLoss
from msn.method.optim import FiniteCheck
from msn.training.strategy import shard
from tests.cuda.conftest import case, one_of_eight

HALF = torch.bfloat16
# What mixed precision takes in half precision wherever it stands; products of the loss are float32.
TYPED = ("addmm", "convolution", "gelu", "gelu_backward", "_scaled_dot_product_flash_attention")


def check_step(gpu, made):
    """Take two steps and look at the second one: in the first one states come to the device."""
    gpu.strict = False
    method = TrainingStep(made)
    method.step()
    gpu.reset()
    gpu.strict = True
    method.step()
    alone = made.method.get("kind") != "mae" and num_processes() == 1
    norm = "native_batch_norm" if alone else "native_layer_norm"
    assert {"_fused_adamw_", norm} <= {launch.name for launch in gpu.launches}
    found = {launch.dtype for launch in gpu.launches if launch.name in TYPED}
    assert found == {HALF if made.precision == "bf16-mixed" else torch.float32}
    assert {p.dtype for p in method.module.network.parameters()} == {torch.float32}
    return method


@pytest.mark.parametrize(
    ("experiment", "precision", "chunk_size"),
    [
        ("msn_vits16", "bf16-mixed", None),
        ("msn_vits16", "32-true", 4),
        ("pmsn_vits16", "bf16-mixed", 4),
        ("pmsn_vits16", "32-true", None),
        ("mae_vitb16", "bf16-mixed", None),
        ("mae_vitb16", "32-true", 4),
    ],
)
def test_a_step_never_waits(gpu, experiment, precision, chunk_size):
    check_step(gpu, case(experiment, precision=precision, chunk_size=chunk_size))


NORM = BatchNorm.forward


def read_a_norm(self, numbers):
    return numbers[0].new_full((), numbers[0].item())


def take_by_mask(self, x):
    return NORM(self, x[x[:, 0] > 0])


def look_at_statistics(self, x):
    self.running_mean.cpu()
    return NORM(self, x)


def forget_the_device(self, prototypes):
    return torch.full((prototypes.shape[0],), -1.0)


def scale_in_float32(self, x):
    return NORM(self, x * torch.ones(x.shape[-1], device=x.device))


def no_autocast(self):
    return contextlib.nullcontext()  # views in half precision meet weights in float32


MUTATIONS = {
    "item": (FiniteCheck, "judge", read_a_norm, "reads"),
    "boolean index": (BatchNorm, "forward", take_by_mask, "nonzero"),
    "blocking copy": (BatchNorm, "forward", look_at_statistics, "blocking copy"),
    "host constant": (MSNLoss, "_log_prior", forget_the_device, "on the host"),
    "float32 constant": (BatchNorm, "forward", scale_in_float32, "float32"),
    "refused dtype": (TrainingStep, "_autocast", no_autocast, "dtype"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_check_sees(gpu, monkeypatch, mutation):
    *where, wrong, said = MUTATIONS[mutation]
    monkeypatch.setattr(*where, wrong)
    with pytest.raises((AssertionError, RuntimeError, DynamicOutputShapeException), match=said):
        check_step(gpu, case())


COLLECTIVES = (
    "allreduce_",
    "allgather_",
    "_allgather_base_",
    "_reduce_scatter_base_",
    "broadcast_",
)


def sent(gpu, rank, made):
    """Collectives of a step, in order, each with its bytes."""
    with one_of_eight(rank):
        check_step(gpu, made)
    return [(each.name, each.moved) for each in gpu.launches if each.name in COLLECTIVES]


def test_one_of_eight_processes_never_waits_and_all_send_the_same_in_the_same_order(gpu):
    first, last = (sent(gpu, rank, case()) for rank in (0, 7))
    assert first == last
    wanted = scaling.traffic(scaling.settings_of("msn_vits16"), 8)[1:]  # gradients are DDP's
    calls = Counter(name for name, _ in first)
    assert calls == {
        "allgather_": sum(each.calls for each in wanted if each.kind == "all-gather"),
        "allreduce_": sum(each.calls for each in wanted if each.kind == "all-reduce"),
    }


def cut_step(gpu, rank):
    """Collectives of a step of a network that is cut over the processes (FSDP2)."""
    gpu.strict = False
    with one_of_eight(rank):
        method = TrainingStep(case())
        shard(method.module.network, init_device_mesh("cuda", (8,)))
        method.optimizer = method.module.configure_optimizers()
        method.step()
        gpu.reset()
        gpu.strict = True
        method.step()
    return [(each.name, each.moved) for each in gpu.launches if each.name in COLLECTIVES]


def test_a_cut_network_never_waits_and_all_processes_send_the_same(gpu):
    first, last = (cut_step(gpu, rank) for rank in (0, 7))
    assert first == last
    calls = Counter(name for name, _ in first)
    # Two blocks each of anchor and target, and all the rest together, which stays between the
    # ways. Those of the anchor come again for the backward pass and give their gradients; torch
    # fetches the block before them in vain, the target's.
    assert calls["_allgather_base_"] == 5 + 3
    assert calls["_reduce_scatter_base_"] == 3
