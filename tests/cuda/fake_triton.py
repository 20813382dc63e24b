"""Triton kernels that check their operands and take note, instead of running on the fake device."""

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
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


class _Kernel:
    """What Inductor would compile; it takes note of the bytes it would move."""

    def __init__(self, gpu: "FakeCuda", name: str, source: str) -> None:
        self.gpu, self.name = gpu, name
        found = re.search(r"\ndef \w+\(([^)]*)\)", source)
        assert found is not None
        self.operands = [part.split(":")[0].strip() for part in found[1].split(",")]

    def run(self, *args: Any, stream: Any) -> None:
        tensors = []
        for name, x in zip(self.operands, args, strict=False):
            if isinstance(x, Tensor):  # read and written, or one of both
                tensors += [x, x] if name.startswith("in_out") else [x]
        self.gpu.note(self.name, tensors)


def _as_strided(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
    return torch.as_strided(x, size, stride, x.storage_offset() + offset)


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda:0")


@contextlib.contextmanager
def fake_inductor(gpu: "FakeCuda") -> Iterator[None]:
    """Let Inductor generate its code for the fake device, with kernels that take note."""
    import torch._inductor.scheduler as scheduler
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx
    from torch._inductor import config as inductor_config
    from torch._inductor.async_compile import AsyncCompile
    from torch.utils import _triton

    guards, properties = torch._C._dynamo.guards, staticmethod(torch.cuda.get_device_properties)
    answers = [
        (CudaInterface, "get_device_properties", properties),
        (CudaInterface.Worker, "get_device_properties", properties),
        (CudaInterface, "get_raw_stream", staticmethod(lambda _: 0)),
        (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
        (torch.cuda, "_DeviceGuard", lambda _: contextlib.nullcontext()),
        (torch.cuda, "device", lambda _: contextlib.nullcontext()),
        (torch.cuda, "set_device", lambda _: None),
        (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch.cuda, "_exchange_device", lambda _: 0),
        (torch.cuda, "_maybe_exchange_device", lambda _: 0),
        (guards, "_empty_strided_cuda", _empty),
        (guards, "_reinterpret_tensor", _as_strided),
        (guards, "assert_size_stride", lambda *_: None),
        (_triton, "triton_hash_with_backend", lambda *_: "fake"),
        (AsyncCompile, "triton", lambda self, name, source, **_: _Kernel(gpu, name, source)),
    ]
    knows = [m for m in (_triton, scheduler, compile_fx) if hasattr(m, "has_triton")]
    answers += [(module, "has_triton", lambda *_, **__: True) for module in knows]
    with contextlib.ExitStack() as stack:
        for target, name, value in answers:
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(
            inductor_config.patch(
                compile_threads=1,
                shape_padding=False,
                joint_graph_constant_folding=False,
                fx_graph_cache=False,
                autotune_local_cache=False,
            )
        )
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        yield
