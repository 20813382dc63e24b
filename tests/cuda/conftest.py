"""The fake device, where it makes sense, and the product's step on it."""

import contextlib
import importlib.util
import os
import shutil

import pytest
import torch
import torch.distributed as dist

from msn.commands.entry import compose, to_plain
from msn.commands.step import case_of
from msn.data.datamodule import copy_stream

# Autograd counts devices at the first backward pass of a process, so that these tests need one of
# their own: tests/test_cuda.py starts it, and so does `MSN_FAKE_CUDA=1 pytest tests/cuda`.
collect_ignore_glob = [] if "MSN_FAKE_CUDA" in os.environ else ["test_*.py"]


def why_not() -> str | None:
    """Why there can be no fake device here."""
    if torch.cuda.is_available():
        return "there is a real CUDA device, which tests marked gpu use"
    if not torch.backends.cuda.is_built() or importlib.util.find_spec("triton") is None:
        return "needs torch with CUDA and Triton"
    if not any(map(shutil.which, ("g++", "clang++"))):
        return "needs a C++ compiler"
    return None


@pytest.fixture(scope="session")
def guard(request):
    """Autograd believes in one CUDA device from now on; the library is kept in pytest's cache."""
    if reason := why_not():
        pytest.skip(reason)
    from tests.cuda.fake_cuda import build_guard

    build_guard(request.config.cache.mkdir("fake_cuda"))


@pytest.fixture
def gpu(guard):
    from msn.data import cuda_views
    from tests.cuda.fake_cuda import FakeCuda

    def forget():
        cuda_views._orders.cache_clear()
        copy_stream.cache_clear()

    forget()
    with FakeCuda() as gpu:
        yield gpu
    forget()


def case(experiment="msn_vits16", *, depth=2, **changes):
    """A preset's training step as bench takes it on this device, few blocks, not compiled."""
    settings = to_plain(compose("bench", ["what=step", f"experiment={experiment}"]))
    made = case_of(settings)._replace(batch_size=6)
    model = made.model if depth is None else {**made.model, "depth": depth}
    return made._replace(model=model, compile=False)._replace(**changes)


@contextlib.contextmanager
def one_of_eight(rank):
    """A process whose seven others answer at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    try:
        yield
    finally:
        dist.destroy_process_group()
