"""Images, views and their order are the same whatever the number of workers and processes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.data.datamodules import make_datamodule
from tests.data.photos import make_folder

EPOCHS = 2


def digest(batch, item):
    """Of an image's pixels and of all numbers that make its views."""
    data = batch.image(item).numpy().tobytes() + batch.table[:, item].numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:12]


def seen(module, rank=0, world_size=1):
    """For every batch of every epoch: image numbers, digests of pixels and view parameters."""
    sampler = module.sampler(rank=rank, world_size=world_size)
    batches = []
    loader = module.loader(sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for batch in loader:
            rows = [(int(i), digest(batch, at)) for at, i in enumerate(batch.indices)]
            batches.append((batch.epoch, batch.batch, rows))
    return batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("order"), classes=2, images=7)


@pytest.fixture(scope="module")
def alone(folder):
    return seen(make_datamodule(folder))


def test_workers_change_nothing(folder, alone):
    assert [batch[:2] for batch in alone] == [(e, b) for e in range(EPOCHS) for b in range(2)]
    for workers in (1, 3):
        assert seen(make_datamodule(folder, num_workers=workers)) == alone


def test_processes_share_each_global_batch_in_its_order(folder, alone):
    for world in (2, 3):
        shares = [seen(make_datamodule(folder), rank, world) for rank in range(world)]
        together = [
            (*parts[0][:2], [row for part in parts for row in part[2]])
            for parts in zip(*shares, strict=True)
        ]
        assert together == alone


def test_a_view_does_not_depend_on_what_else_is_in_its_batch(folder):
    module = make_datamodule(folder)
    whole = module.make_views(next(iter(module.loader(module.sampler(rank=0, world_size=1)))))
    part = module.make_views(next(iter(module.loader(module.sampler(rank=1, world_size=3)))))
    for ours, theirs in zip(part[:3], whole[:3], strict=True):
        theirs = theirs[2:4] if theirs.ndim == 4 else theirs[:, 2:4]
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_epochs_and_seeds_change_order_and_views(folder, alone):
    first, second = alone[0][2], alone[2][2]
    assert [row[0] for row in first] != [row[0] for row in second]
    both = {row[0]: row[1] for batch in alone[:2] for row in batch[2]}
    again = {row[0]: row[1] for batch in alone[2:] for row in batch[2]}
    assert all(both[i] != again[i] for i in both.keys() & again.keys())
    assert seen(make_datamodule(folder, seed=1)) != alone


def test_an_epoch_shows_every_image_once_and_leaves_out_others_each_time(folder):
    module = make_datamodule(folder, global_batch_size=4)
    left = []
    for epoch in range(3):
        keys = module.sampler(rank=0, world_size=1).keys(epoch)
        shown = [int(i) for key in keys for i in key.indices]
        assert len(shown) == len(set(shown)) == 12
        left.append(set(range(14)) - set(shown))
    assert left[0] != left[1] != left[2]


def test_a_position_goes_on_where_it_was(folder, alone):
    module = make_datamodule(folder)
    sampler = module.sampler(rank=0, world_size=1)
    sampler.go_to(0, 1)
    rest = [(b.epoch, b.batch, b.indices.tolist()) for b in module.loader(sampler)]
    assert rest == [(e, b, [row[0] for row in rows]) for e, b, rows in alone[1:2]]
    sampler.go_to(0, 2)
    assert next(iter(module.loader(sampler))).epoch == 1


PROCESS = """
import sys
from datetime import timedelta
import torch.distributed as dist
from tests.data.datamodules import make_datamodule
from tests.data.test_order import seen
folder, file, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group(
    "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
)
mine = seen(make_datamodule(folder, num_workers=1), dist.get_rank(), dist.get_world_size())
shares = [None, None]
dist.all_gather_object(shares, mine)
if rank == 0:
    together = [(*a[:2], a[2] + b[2]) for a, b in zip(*shares, strict=True)]
    print(repr(together))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_real_processes_with_workers_see_what_one_sees(folder, alone, tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PROCESS, str(folder), str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    both = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, cwd=root, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    out = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert out[0].strip() == repr(alone)


def test_processes_of_a_node_share_its_cores(folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    data = make_datamodule(folder, num_workers=None)
    assert data.num_workers == 16
    data.trainer = SimpleNamespace(num_devices=8)
    assert data.num_workers == 4
    data.trainer = None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert data.num_workers == 2
