"""What is logged, against slow twins on small batches."""

import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from msn.evaluation.neighbours import rankme
from msn.method.loss import MSNLoss
from msn.training.monitors import (
    prototype_use,
    step_scalars,
    strongest_prototypes,
)
from msn.training.statistics import IMAGES_PER_PROTOTYPE, StepClock, StepMeans, Window

LOSS = MSNLoss(
    temperature=0.1,
    me_max_weight=1.0,
    entropy_weight=0.0,
    use_sinkhorn=False,
    sinkhorn_iterations=3,
)


@pytest.fixture
def step():
    generator = torch.Generator().manual_seed(0)
    anchor, target, prototypes = (
        torch.randn(*shape, generator=generator) for shape in [(3, 6, 4), (6, 4), (5, 4)]
    )
    return LOSS(anchor, target, prototypes, 0.25), anchor, prototypes


def test_agreement_is_counted_per_kind_of_view_and_the_floor_is_the_targets_entropy(step):
    terms, anchor, prototypes = step
    nearest = strongest_prototypes(anchor, prototypes)
    cosines = F.normalize(anchor, dim=-1) @ F.normalize(prototypes, dim=-1).T
    assert torch.equal(nearest, cosines.argmax(-1))
    strongest = terms.targets.argmax(-1)
    scalars = step_scalars(terms, nearest, strongest, rand_views=1)
    same = [[int(a == s) for a, s in zip(row, strongest, strict=True)] for row in nearest]
    assert scalars["collapse/agreement_rand"] == pytest.approx(sum(same[0]) / 6)
    assert scalars["collapse/agreement_focal"] == pytest.approx((sum(same[1]) + sum(same[2])) / 12)
    floor = sum(-p * math.log(p) for row in terms.targets.tolist() for p in row if p > 0) / 6
    assert scalars["train/cross_entropy_floor"] == pytest.approx(floor, rel=1e-5)
    assert scalars["train/cross_entropy"] >= scalars["train/cross_entropy_floor"]


def test_a_step_that_is_not_finite_is_left_out_of_means():
    means = StepMeans()
    for value in (1.0, math.nan, 3.0):
        means.add({"a": torch.tensor(value), "b": torch.tensor(math.inf)})
    taken = means.take()
    assert taken["a"].item() == 2.0
    assert taken["b"].isnan()


def test_no_focal_views_no_figure_of_them(step):
    terms, anchor, prototypes = step
    nearest = strongest_prototypes(anchor[:1], prototypes)
    assert "collapse/agreement_focal" not in step_scalars(terms, nearest, nearest[0], rand_views=1)


def test_means_run_over_the_steps_of_an_interval():
    means = StepMeans()
    for value in (1.0, 2.0, 6.0):
        means.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    assert {name: value.item() for name, value in means.take().items()} == {"a": 3.0, "b": -3.0}
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(5.0)})
    assert means.take()["a"].item() == 5.0


def test_a_window_s_figures_are_those_of_its_images_put_together(step):
    terms, _, _ = step
    strongest = terms.targets.argmax(-1)
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)) + 1
    window = Window(5, 4)
    window.add(prototype_use(terms, strongest), 3 * features, processes=1)
    window.add(prototype_use(terms, strongest), -features, processes=1)
    figures = window.figures(rank=True)
    rows = F.normalize(torch.cat([features, -features]), dim=1)
    assert figures["features/rankme"].item() == pytest.approx(rankme(rows), rel=1e-5)
    std = rows.std(dim=0, correction=0).mean() * math.sqrt(4)
    assert figures["features/std"].item() == pytest.approx(std.item(), rel=1e-5)
    assert figures["collapse/prototypes_used"] == len(set(strongest.tolist()))
    mean = terms.targets.mean(0)
    perplexity = math.exp(-(mean * mean.log()).sum())
    assert figures["collapse/prototype_perplexity"].item() == pytest.approx(perplexity, rel=1e-5)
    prediction = terms.mean_prediction
    entropy = -(prediction * prediction.log()).sum() / math.log(5)
    assert figures["collapse/mean_prediction_entropy"].item() == pytest.approx(entropy.item())


def test_features_of_one_direction_have_rank_one_and_no_spread(step):
    terms, _, _ = step
    window = Window(5, 4)
    window.add(prototype_use(terms, terms.targets.argmax(-1)), torch.ones(6, 4), processes=1)
    figures = window.figures(rank=True)
    assert figures["features/rankme"].item() == pytest.approx(1, abs=1e-3)
    assert figures["features/std"].item() == pytest.approx(0, abs=1e-3)


def test_a_window_forgets_old_images_and_never_shrinks_to_a_handful(step):
    terms, _, _ = step
    window = Window(5, 4)
    held = []
    for _ in range(60):
        window.add(prototype_use(terms, terms.targets.argmax(-1)), torch.randn(6, 4), processes=1)
        buckets = (window.older, window.newer)
        held.append(sum(bucket.images for bucket in buckets if bucket is not None))
    assert max(held) < 2 * IMAGES_PER_PROTOTYPE * 5 + 2 * 6
    assert min(held[20:]) >= IMAGES_PER_PROTOTYPE * 5


def test_the_clock_tells_waiting_from_training(monkeypatch):
    now = iter([0, 0, 3, 4, 7, 8, 8])  # restart reads twice; waits of 3 s, steps of 1 s
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        clock.step_begins()
        clock.step_ends()
    assert clock.read() == (8.0, 6 / 8)


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
        window.add(prototype_use(terms, strongest), target[mine], processes=world)
    return {
        name: float(value) for name, value in (means.take() | window.figures(rank=True)).items()
    }


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
