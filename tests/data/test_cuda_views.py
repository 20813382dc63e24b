"""On CUDA: the views are the reference's, and the host never waits for the device."""

import importlib.util
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from msn.data.batched_views import make_batched_views
from msn.data.datamodule import copy_stream
from msn.data.reference_views import make_reference_views
from msn.data.views import IMAGENET_STD, ViewSettings
from tests.data.datamodules import make_datamodule
from tests.data.test_batched_views import CASES, PAPER, make_batch


def on_a_gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_give_what_products_of_matrices_give():
    """By Triton's interpreter, which must be chosen before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.data.test_cuda_views import interpret; interpret()"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def interpret():
    from msn.data.cuda_views import make_cuda_views

    small = {"rand_size": 48, "focal_size": 32, "focal_views": 3}
    settings = ViewSettings(**{**PAPER, **small})
    photo, other = load_sample_images().images
    parts = photo[:90, :120], other[100:180, 200:260], photo[200:233, 300:410], other[:20, :17]
    batch = make_batch(settings, [np.ascontiguousarray(part) for part in parts])
    wanted = make_batched_views(batch, settings, dtype=torch.float32, kernel="each")
    for dtype, most in {torch.float32: 1e-4, torch.bfloat16: 0.02}.items():
        for a, b in zip(make_cuda_views(batch, settings, dtype=dtype)[:3], wanted[:3], strict=True):
            assert a.dtype == dtype
            assert a.shape == b.shape
            assert (a.float() - b).abs().max() < most, dtype
    settings = ViewSettings(**{**PAPER, **small, "focal_views": 0})
    none = make_cuda_views(make_batch(settings, [photo[:50, :50]]), settings, dtype=torch.float32)
    assert none.focal.shape == (0, 1, 3, 32, 32)


def on_cuda(batch):
    return batch._replace(pixels=batch.pixels.cuda())


@on_a_gpu
@pytest.mark.parametrize("case", CASES)
def test_views_made_on_cuda_are_those_of_the_reference(case):
    changes, most = CASES[case]
    settings = ViewSettings(**{**PAPER, **changes})
    batch = make_batch(settings)
    ours = make_batched_views(on_cuda(batch), settings, dtype=torch.float32)
    theirs = make_reference_views(batch, settings, device=torch.device("cpu"), dtype=torch.float32)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    for made, wanted in zip(ours[:3], theirs[:3], strict=True):
        assert ((made.cpu() - wanted).abs() * std).mean() * 255 < most


@on_a_gpu
def test_making_views_never_waits_for_the_device():
    settings = ViewSettings(**PAPER)
    batch = on_cuda(make_batch(settings))
    make_batched_views(batch, settings, dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = make_batched_views(batch, settings, dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(view.isfinite().all() for view in views[:3])


SECOND = 2_000_000_000  # cycles, about


@pytest.fixture
def copied():
    """A data module, a pinned batch of it, another one of that size, and the views of both."""
    data = make_datamodule(None, source="digits", image_size=64, global_batch_size=64)
    batches = itertools.islice(data.train_dataloader(), 2)
    pinned = [batch._replace(pixels=batch.pixels.pin_memory()) for batch in batches]
    views = [data.make_views(move(data, batch)).target for batch in pinned]
    torch.cuda.synchronize()
    return data, pinned, views


def move(data, batch):
    return data.transfer_batch_to_device(batch, torch.device("cuda", 0), 0)


@on_a_gpu
def test_pixels_are_copied_while_the_device_is_still_at_the_step_before(copied):
    data, (batch, _), _ = copied
    torch.cuda._sleep(SECOND)  # the step before
    moved = move(data, batch)
    copy_stream(torch.device("cuda", 0)).synchronize()
    assert not torch.cuda.current_stream().query()
    assert torch.equal(moved.pixels.cpu(), batch.pixels)


@on_a_gpu
def test_views_wait_for_their_pixels(copied):
    data, (batch, _), (wanted, _) = copied
    with torch.cuda.stream(copy_stream(torch.device("cuda", 0))):
        torch.cuda._sleep(SECOND)
    assert torch.equal(data.make_views(move(data, batch)).target, wanted)


@on_a_gpu
def test_pixels_stay_until_their_views_are_made(copied):
    data, (batch, other), (wanted, _) = copied
    moved = move(data, batch)
    torch.cuda._sleep(SECOND)
    made = data.make_views(moved)
    del moved
    move(data, other)
    assert torch.equal(made.target, wanted)
