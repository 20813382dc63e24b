"""Triton kernels that check their operands and take note, instead of running on the fake device."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import Tensor
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from tests.cuda.fake_cuda import FakeCuda

_MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # of a grid's axes on CUDA


@contextlib.contextmanager
def noted_kernels(gpu: "FakeCuda") -> Iterator[None]:
    """Kernels that are called as `kernel[grid](...)`."""

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        given = kernel.signature.bind(*args, **kwargs).arguments
        name = kernel.fn.__name__
        if not all(0 < n <= most for n, most in zip(grid, _MOST_BLOCKS, strict=False)):
            raise RuntimeError(f"{name}: CUDA takes no grid of {grid}")
        operands = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        for key, x in operands.items():
            if x.device.type != "cuda":
                raise RuntimeError(f"{name}: operand {key} lies on the host")
            if not x.is_contiguous():
                raise RuntimeError(f"{name}: operand {key} has strides {x.stride()}")
        gpu.kernels.append((kernel, given))
        gpu.note(name, list(operands.values()))

    with mock.patch.object(JITFunction, "run", run):
        yield
