"""Collectives, by which every process sees the whole batch; the identity on one process.

Gradients are those of the mean of the processes' losses, as DDP averages parameter gradients.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def num_processes() -> int:
    """World size of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of a tensor over processes, same shape; without gradient."""
    if num_processes() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def all_reduce_logsumexp(x: Tensor) -> Tensor:
    """log(sum(exp(x))) over processes, elementwise, same shape; without gradient."""
    if num_processes() == 1:
        return x
    return torch.logsumexp(_gathered(x), dim=0)


def all_reduce_logmeanexp(x: Tensor) -> Tensor:
    """log(mean(exp(x))) over processes, elementwise, same shape; differentiable."""
    return _AllReduceLogMeanExp.apply(x) if num_processes() > 1 else x


def whole(x: Tensor) -> Tensor:
    """A tensor that may be sharded, whole on each process; a collective if it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def gathered(network: nn.Module, part: nn.Module) -> Iterator[None]:
    """Context in which all processes can call a part of a sharded network on its own.

    That part, and what the network does not shard by blocks, is whole on each process.
    """
    sharded = [m for m in (network, *part.modules()) if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d with batch statistics over all processes, which must have as many rows each.

    torch's SyncBatchNorm refuses CPU tensors.
    """

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if not self.training or num_processes() == 1:
            return super().forward(x)
        rows = x.to(torch.promote_types(x.dtype, torch.float32))  # [rows, features]
        spread, centre = torch.var_mean(rows, dim=0, correction=0)
        mean, variance = _Moments.apply(torch.stack([centre, spread]))
        self._update_running_statistics(mean, variance, rows.shape[0] * num_processes())
        normed = (rows - mean) * torch.rsqrt(variance + self.eps)
        return (normed * self.weight + self.bias).to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class _Moments(torch.autograd.Function):
    """Mean and variance over all processes from those of each, [2, features].

    One collective in each direction; E[x^2] - E[x]^2 would cancel.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        means, variances = _gathered(own).unbind(1)
        mean = means.mean(dim=0)
        ctx.save_for_backward(own[0] - mean)
        return torch.stack([mean, (variances + (means - mean).square()).mean(dim=0)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (offset,) = ctx.saved_tensors
        mean, variance = _mean(grad)
        return torch.stack([mean + 2 * offset * variance, variance])


class _AllReduceLogMeanExp(torch.autograd.Function):
    """Log of the mean of exponentials; its gradient is the mean one times the process's share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = all_reduce_logsumexp(x) - math.log(num_processes())
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, result = ctx.saved_tensors
        return _mean(grad) * (x - result).exp()


def _gathered(x: Tensor) -> Tensor:
    """The tensors of all processes, [processes, ...]."""
    parts = [torch.empty_like(x) for _ in range(num_processes())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.stack(parts)


def _mean(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / num_processes()
