"""On CUDA: the views are the reference's, and the host never waits for the device."""

import pytest
import torch

from msn.data.device_views import make_batched_views
from msn.data.reference_views import make_reference_views
from msn.data.views import IMAGENET_STD, ViewSettings
from tests.data.test_device_views import CASES, PAPER, make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cuda(batch):
    return batch._replace(pixels=batch.pixels.cuda())


@pytest.mark.parametrize("case", CASES)
def test_views_made_on_cuda_are_those_of_the_reference(case):
    changes, most = CASES[case]
    settings = ViewSettings(**{**PAPER, **changes})
    batch = make_batch(settings)
    ours = make_batched_views(on_cuda(batch), settings, dtype=torch.float32)
    theirs = make_reference_views(batch, settings, device=torch.device("cpu"), dtype=torch.float32)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    for made, wanted in zip(ours, theirs, strict=True):
        assert ((made.cpu() - wanted).abs() * std).mean() * 255 < most


def test_making_views_never_waits_for_the_device():
    settings = ViewSettings(**PAPER)
    batch = on_cuda(make_batch(settings))
    make_batched_views(batch, settings, dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = make_batched_views(batch, settings, dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(view.isfinite().all() for view in views)
