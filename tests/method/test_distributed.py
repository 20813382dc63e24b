"""Two gloo processes with half the batch each give what one process gives with the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from msn.method import distributed, loss
from msn.method.loss import MSNLoss
from msn.method.network import MSN
from tests.conftest import SMALL_HEAD, SMALL_MODEL


def one_step(images, rank=0, world=1):
    """Loss, terms, targets, gradients (averaged over processes) and BatchNorm buffers."""
    torch.manual_seed(0)
    network = MSN(model=SMALL_MODEL, head=SMALL_HEAD, num_prototypes=10).double()
    objective = MSNLoss(
        temperature=0.1,
        me_max_weight=1.0,
        entropy_weight=0.5,
        use_sinkhorn=True,
        sinkhorn_iterations=3,
    )
    share = images.shape[1] // world
    part = images[:, rank * share : (rank + 1) * share]
    out = network(part[0], part[1:2], part[2:, ..., :8, :8], torch.arange(12))
    terms = objective(out.anchor, out.target, network.prototypes, 0.25)
    terms.loss.backward()
    result = {
        "loss": distributed.all_reduce_mean(terms.loss.detach()),
        "me_max": terms.me_max.detach(),
        "targets": terms.targets,
    }
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            result[f"grad {name}"] = distributed.all_reduce_mean(parameter.grad)
    result |= {f"buffer {name}": value.clone() for name, value in network.named_buffers()}
    return result


def worker(rank, port, images, mutation, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    if mutation == "mean":  # me-max alone; BatchNorm has its own name for the same function
        loss.all_reduce_mean = lambda x: x
    elif mutation == "logsumexp":
        loss.all_reduce_logsumexp = lambda x: x
    elif mutation == "batch norm":
        distributed.BatchNorm.forward = torch.nn.BatchNorm1d.forward
    queue.put((rank, {k: v.numpy() for k, v in one_step(images, rank, 2).items()}))
    dist.barrier()
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_processes(images, mutation=None):
    port = free_port()
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=worker, args=(rank, port, images, mutation, queue))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    merged = {k: torch.from_numpy(v) for k, v in results[0].items()}
    merged["targets"] = torch.cat([torch.from_numpy(results[r]["targets"]) for r in range(2)])
    return merged


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(5, 8, 3, 16, 16, generator=generator, dtype=torch.float64)


def differing(ours, theirs):
    assert ours.keys() == theirs.keys()
    return {k for k in ours if not torch.allclose(ours[k], theirs[k], rtol=1e-9, atol=1e-11)}


def test_two_processes_equal_one_on_the_joined_batch(images):
    assert differing(two_processes(images), one_step(images)) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "seen"),
    [
        ("mean", "me_max"),
        ("logsumexp", "targets"),
        ("batch norm", "buffer anchor.head.bn1.running_var"),
    ],
)
def test_a_collective_replaced_by_the_identity_is_seen(images, mutation, seen):
    assert seen in differing(two_processes(images, mutation), one_step(images))


def test_on_one_process_collectives_are_the_identity():
    x = torch.randn(3)
    assert distributed.num_processes() == 1
    for collective in ("all_reduce_mean", "all_reduce_sum", "all_reduce_logsumexp"):
        assert_close(getattr(distributed, collective)(x), x)
