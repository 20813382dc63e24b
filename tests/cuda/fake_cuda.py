"""A CUDA device that is not there: tensors on it have shape, type and size, but no numbers.

    with FakeCuda() as gpu:
        x = torch.rand(4, 3).to("cuda", non_blocking=True)
        (x @ x.T).sum()
    gpu.launches, gpu.peak

Tensors on the host stay real, those on `cuda` are torch's fake ones. Every operator passes by and
is noted. It fails where the host would wait for the device, where operands lie on different
devices, and where a product has factors of two types.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from tests.cuda.fake_triton import noted_kernels

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
_BLOCK = 512  # bytes to which CUDA's allocator rounds
# A copy from memory that is not pinned returns at once up to this size, as CUDA's manual says.
_STAGED = 64 << 10

# Operators that bring a number to the host although their result has a known shape.
_READS = {aten._local_scalar_dense, aten._linalg_eigh, aten._linalg_svd, aten._linalg_check_errors}
_PRODUCTS = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution,
    aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
}  # fmt: skip
# What launches nothing and torch does not call a view.
_NOTHING = {"_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"}

# What Inductor asks of a card, as CUDA tells it of this one.
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=False,
    uuid="0",
)


class HostWaits(AssertionError):
    """The host would wait for the device."""


class Launch(NamedTuple):
    """One kernel."""

    name: str
    dtype: torch.dtype | None
    """Of its first operand of floating point."""
    moved: int
    """Bytes of all operands and results."""
    operations: float = 0.0
    """Of a product of matrices."""


class FakeCuda(TorchDispatchMode):
    """Within, `cuda` is a device without data.

    Attributes:
        strict: whether a wait fails at once; else it is only noted.
        waits: what the host would have waited for.
        launches: kernels, in order.
        kernels: of them the product's own Triton kernels, with their arguments by name.
        allocated, peak: bytes on the device, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strict = True
        self.waits: list[str] = []
        self.launches: list[Launch] = []
        self.kernels: list[tuple[Any, dict[str, Any]]] = []
        self.allocated = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}
        self._stack = contextlib.ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Blocks may be compiled within; what their graphs call passes by."""
        return True

    def __enter__(self) -> "FakeCuda":
        self._stack.enter_context(_as_if_there_were_a_driver())
        self._stack.enter_context(noted_kernels(self))
        self._stack.enter_context(
            FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def reset(self) -> None:
        """Forget launches and waits; the peak starts anew."""
        self.waits, self.launches, self.kernels, self.peak = [], [], [], self.allocated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        packet = func.overloadpacket
        if packet is torch.ops.prim.device:
            return func(*args, **kwargs)
        wanted = any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
        if not wanted and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return _on_host(func, packet, args, kwargs)
        if packet is aten.record_stream:
            return None
        if packet in (aten._to_copy, aten.copy_):
            self._check_copy(packet, args, kwargs)
        elif any(_on_cuda(x) for x in tensors):
            self._check_operands(packet, tensors)
        if packet is aten._fused_sgd_:  # which torch's fake tensors do not know
            self.note("_fused_sgd_", [*tensors, *args[0]])
            return None
        if packet is aten._local_scalar_dense:
            return 0.0 if args[0].is_floating_point() else 0
        if packet is aten.copy_ and not _on_cuda(args[0]):
            out = args[0]
        else:
            out = tree_map_only(FakeTensor, partial(_real_on_host, kwargs), func(*args, **kwargs))
        everything = [x for x in (*tensors, *tree_leaves(out)) if _on_cuda(x)]
        self._account(everything)
        name = packet.__name__
        if everything and not func.is_view and name not in _NOTHING:
            count = flop_registry.get(packet)
            done = 0.0 if count is None else float(count(*args, **kwargs, out_val=out))
            self.note(name, everything, done)
        return out

    def note(self, name: str, tensors: list[Tensor], operations: float = 0.0) -> None:
        """Note a kernel that reads or writes these tensors."""
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), None)
        self.launches.append(Launch(name, dtype, sum(_bytes(x) for x in tensors), operations))

    def _check_copy(self, packet: Any, args: Any, kwargs: Any) -> None:
        if packet is aten.copy_:
            to, source, *more = args
            device, apart = to.device, more[0] if more else kwargs.get("non_blocking", False)
        else:
            source = args[0]
            device, apart = kwargs.get("device") or source.device, kwargs.get("non_blocking", False)
        if source.device.type == device.type:
            return
        pinned = getattr(source, "pinned", False)
        staged = _bytes(source) <= _STAGED
        if not apart or (source.device.type == "cpu" and not pinned and not staged):
            where = f"{source.device.type} -> {device.type}"
            how = "not pinned" if apart else "blocking"
            self.wait(f"{how} copy {where} of {tuple(source.shape)} {source.dtype}")

    def _check_operands(self, packet: Any, tensors: list[Tensor]) -> None:
        if packet in _READS:
            self.wait(f"{packet} reads {[tuple(x.shape) for x in tensors]}")
        host = [tuple(x.shape) for x in tensors if not _on_cuda(x) and x.ndim > 0]
        if host:
            raise RuntimeError(f"{packet}: operands {host} lie on the host, others on the device")
        dtypes = {x.dtype for x in tensors if x.is_floating_point()}
        if packet in _PRODUCTS and len(dtypes) > 1:  # shapes alone are checked without numbers
            raise RuntimeError(f"{packet}: expected one dtype, found {dtypes}")

    def wait(self, what: str) -> None:
        """Note that the host waits, or fail."""
        self.waits.append(what)
        if self.strict:
            raise HostWaits(what)

    def _account(self, tensors: list[Tensor]) -> None:
        # What wraps tensors, as DTensor does, has a size but no memory of its own.
        own = [x for x in tensors if not is_traceable_wrapper_subclass(x)]
        for storage in [x.untyped_storage() for x in own]:
            key = storage._cdata
            if key not in self._storages:

                def gone(_: Any, key: int = key) -> None:
                    del self._storages[key]
                    self.allocated -= self._sizes.pop(key)

                self._storages[key] = weakref.ref(storage, gone)
            # FSDP2 empties storages and fills them again.
            size = -(-storage.nbytes() // _BLOCK) * _BLOCK
            self.allocated += size - self._sizes.get(key, 0)
            self._sizes[key] = size
            self.peak = max(self.peak, self.allocated)

    def resizing(self, resize: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """A function that changes the size of a tensor's storage, which no operator tells."""

        def noted(tensor: Tensor) -> None:
            resize(tensor)
            self._account([tensor])

        return noted


def _on_host(func: Any, packet: Any, args: Any, kwargs: Any) -> Any:
    """As it is, but that memory can be called pinned without a driver."""
    if packet is aten.is_pinned:
        return getattr(args[0], "pinned", False)
    if packet is aten._pin_memory:
        out = args[0].clone()
    elif kwargs.get("pin_memory"):
        out = func(*args, **{**kwargs, "pin_memory": False})
    else:
        return func(*args, **kwargs)
    out.pinned = True
    return out


def _real_on_host(kwargs: dict[str, Any], x: FakeTensor) -> Tensor:
    """Zeros in place of a result that lies on the host."""
    if x.device.type != "cpu":
        return x
    with unset_fake_temporarily():
        out = torch.zeros(x.shape, dtype=x.dtype)
    out.pinned = kwargs.get("pin_memory")
    return out


def _on_cuda(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def _bytes(x: Tensor) -> int:
    """Of the numbers that there are; an expanded axis has one."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return x.element_size() * torch.Size(n for n, step in sizes if step).numel()


def build_guard(folder: Path) -> None:
    """Compile `fake_cuda.cpp` into a folder, unless it is there, and load it for this process."""
    source, root = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent
    library = folder / f"fake_cuda-{torch.__version__}.so"
    if not library.is_file() or library.stat().st_mtime < source.stat().st_mtime:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
        half_made = library.with_suffix(f".{os.getpid()}")  # another process may compile too
        command = [compiler, *options, "-o", half_made, source, "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        half_made.replace(library)
    ctypes.CDLL(str(library)).install_fake_cuda()


class _Event:
    """A point on the device's time line, always reached."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The kernel that CUDA would choose; to ask it needs a device."""
    if query.device.type != "cuda":
        return _host_attention(query, key, value)
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(half), key.to(half), value.to(half)
    if query.dtype == torch.float32:
        learns = torch.is_grad_enabled() and query.requires_grad
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, learns)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value)[0]


_host_attention = F.scaled_dot_product_attention


class _Stream(torch.Stream):
    """Work on it is done at once."""

    def __new__(cls, *_: Any, **__: Any) -> "_Stream":
        return super().__new__(cls, device=CUDA)

    def wait_event(self, _: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def record_event(self, _: Any = None) -> _Event:
        return _Event()


@contextlib.contextmanager
def _as_if_there_were_a_driver() -> Iterator[None]:
    """Answer what torch asks the driver."""
    answers = [
        (FakeTensorMode, "avoid_device_init", property(lambda _: True)),
        (fake_tensor, "init_gpu_context", lambda _: None),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "get_device_properties", lambda _=None: H100),
        (torch.cuda, "get_device_capability", lambda _=None: (H100.major, H100.minor)),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "current_stream", _Stream),
        (torch.accelerator, "current_stream", lambda *_: _Stream()),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        (torch.cuda, "Event", _Event),
        (F, "scaled_dot_product_attention", _attention),
    ]
    with contextlib.ExitStack() as stack:
        for target, name, value in answers:
            stack.enter_context(mock.patch.object(target, name, value))
        yield
