"""Views on the fake CUDA device: few kernels, right operands, nothing that the host waits for."""

import numpy as np
import pytest
import torch

from msn.data import cuda_views
from msn.data.batched_views import make_batched_views
from msn.data.datamodule import _to_device
from msn.data.views import ViewSettings
from tests.data.test_batched_views import PAPER, make_batch

HALF = torch.bfloat16
SIZES = {
    "equal": [(60, 80)] * 8,
    "mixed": [(60, 80), (80, 60), (64, 40), (53, 80)] * 2,
}
# Numbers that a kernel's pointers stand for; it takes others too and reads nonsense.
TYPES = {
    "pixels": torch.uint8,
    "images": torch.int64,
    "orders": torch.int32,
    "table": torch.float32,
    "grays": torch.float32,
}


def check_views(gpu, sizes, dtype=HALF):
    """Make the views of a batch twice, as the data module does; the counted ones are the second."""
    from tests.cuda.fake_cuda import CUDA

    settings = ViewSettings(**PAPER)
    batch = make_batch(settings, [np.zeros((*size, 3), np.uint8) for size in sizes])
    batch = batch._replace(pixels=batch.pixels.pin_memory())
    for _ in range(2):
        gpu.reset()
        there = batch._replace(pixels=_to_device(batch.pixels, CUDA))
        views = make_batched_views(there, settings, dtype=dtype, kernel="cuda")
    count = len(sizes)
    shapes = [(count, 3, 224, 224), (1, count, 3, 224, 224), (4, count, 3, 96, 96)]
    assert [tuple(view.shape) for view in views[:3]] == shapes
    assert {(view.device, view.dtype) for view in views[:3]} == {(CUDA, dtype)}
    assert len(gpu.kernels) == 2 * 5  # of the two sizes
    between = torch.float32 if dtype == torch.float32 else torch.float16
    for kernel, given in gpu.kernels:
        for name, x in given.items():
            if isinstance(x, torch.Tensor):
                last = name == "out" and kernel is cuda_views.blur_columns_kernel
                assert x.dtype == TYPES.get(name, dtype if last else between), (kernel, name)
    assert len(gpu.launches) <= 100
    return len(gpu.launches)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("sizes", SIZES)
def test_views_are_made_by_the_same_few_kernels_whatever_the_batch(gpu, sizes, dtype):
    few, many = (check_views(gpu, SIZES[sizes] * times, dtype) for times in (1, 32))
    assert few == many


def test_one_view_and_no_anchors(gpu):
    from tests.cuda.fake_cuda import CUDA

    settings = ViewSettings(**{**PAPER, "rand_views": 0, "focal_views": 0})
    batch = make_batch(settings, [np.zeros((60, 80, 3), np.uint8)] * 3)
    batch = batch._replace(pixels=_to_device(batch.pixels.pin_memory(), CUDA))
    views = make_batched_views(batch, settings, dtype=HALF, kernel="cuda")
    assert views.target.shape == (3, 3, 224, 224)
    assert (len(views.rand), len(views.focal)) == (0, 0)


UPLOAD = cuda_views._upload


def read_the_mean(values, device):
    there = UPLOAD(values, device)
    return there - there.float().mean().item()


def take_by_mask(values, device):
    there = UPLOAD(values, device)
    return there[there[:, 0] >= 0]


def copy_at_once(values, device):
    return values.to(device)


def copy_from_plain_memory(values, device):
    return values.to(device, non_blocking=True)


def stay_on_the_host(values, device):
    return values


def upload_float64(values, device):
    return UPLOAD(values.double(), device)


MUTATIONS = {
    "item": (read_the_mean, "reads"),
    "boolean index": (take_by_mask, "nonzero"),
    "blocking copy": (copy_at_once, "blocking copy"),
    "memory that is not pinned": (copy_from_plain_memory, "not pinned"),
    "host constant": (stay_on_the_host, "on the host"),
    "float64 table": (upload_float64, "float64"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_check_sees(gpu, monkeypatch, mutation):
    wrong, said = MUTATIONS[mutation]
    monkeypatch.setattr(cuda_views, "_upload", wrong)
    with pytest.raises((AssertionError, RuntimeError), match=said):
        check_views(gpu, SIZES["mixed"] * 32)
