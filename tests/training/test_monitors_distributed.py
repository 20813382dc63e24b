"""Monitors on two processes with half the images each are those of one process with all."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from msn.method.loss import MSNLoss
from msn.training.monitors import StepMeans, Window, step_scalars, strongest_prototypes


def figures(anchor, target, prototypes, rank=0, world=1):
    share = target.shape[0] // world
    mine = slice(rank * share, (rank + 1) * share)
    loss = MSNLoss(
        temperature=0.1,
        me_max_weight=1.0,
        entropy_weight=0.0,
        use_sinkhorn=True,
        sinkhorn_iterations=3,
    )
    terms = loss(anchor[:, mine], target[mine], prototypes, 0.25)
    strongest = terms.targets.argmax(-1)
    nearest = strongest_prototypes(anchor[:, mine], prototypes)
    means, window = StepMeans(), Window(prototypes.shape[0], target.shape[1])
    for _ in range(2):
        means.add(step_scalars(terms, nearest, strongest, rand_views=1))
        window.add(terms, strongest, target[mine], processes=world)
    return {name: float(value) for name, value in (means.take() | window.figures()).items()}


def worker(rank, port, tensors, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    queue.put(figures(*tensors, rank, 2))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_tell_what_one_would():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in [(3, 8, 4), (8, 4), (5, 4)]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    jobs = [context.Process(target=worker, args=(r, port, tensors, queue)) for r in range(2)]
    for job in jobs:
        job.start()
    found = [queue.get(timeout=120) for _ in jobs]
    for job in jobs:
        job.join()
    expected = figures(*tensors)
    assert set(expected) == set(found[0])
    for name, value in expected.items():
        assert found[0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found[0] == found[1]
