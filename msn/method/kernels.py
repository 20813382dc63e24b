"""Parts of a block with their gradients written out, for training on the CPU.

Legend: B images, L tokens of one image, D embedding width, d width of a head, T tokens of all
views together.

torch's automatic gradients of the same formulas copy queries, keys and values several times, keep
the MLP's activated hidden layer, and sum bias gradients slowly; its fused attention is made for
long sequences. On CUDA the compiler does better than this file, which is not used there. Every
function equals its plain formula, named in its docstring, up to rounding.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Attention weights [B, heads, L, L] are kept for the backward pass: up to this length they are
# no more than the queries, keys and values beside them (heads of the usual 64).
MAX_LENGTH = 256
_SCRATCH = threading.local()


def wins(tokens: Tensor, groups: Sequence[tuple[int, int]]) -> bool:
    """Whether these functions beat torch's own: training on the CPU in full precision."""
    return (
        tokens.device.type == "cpu"
        and tokens.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and max(length for _, length in groups) <= MAX_LENGTH
    )


def attend(
    x: Tensor, weight: Tensor, bias: Tensor, groups: Sequence[tuple[int, int]], heads: int
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v inside each image, q, k, v = x weight^T + bias.

    Args:
        x: [T, D].
        weight: of queries, keys and values, [3D, D].
        bias: [3D].
        groups: (images, tokens an image) of each view size; their tokens follow one another.
        heads: attention heads, D = heads * d.

    Returns:
        [T, D].
    """
    return _Attention.apply(x, weight, bias, groups, heads)


def project_and_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """residual + x weight^T + bias; [T, E], [D, E], [D], [T, D] -> [T, D]."""
    return _ProjectAndAdd.apply(x, weight, bias, residual)


def mlp_and_add(
    x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], residual: Tensor
) -> Tensor:
    """residual + gelu(x W1^T + b1) W2^T + b2 without keeping gelu(...) for the backward pass.

    Args:
        x: [T, D].
        first: W1 [hidden, D], b1 [hidden].
        second: W2 [D, hidden], b2 [D].
        residual: [T, D].
    """
    return _MlpAndAdd.apply(x, *first, *second, residual)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: Sequence[tuple[int, int]],
        heads: int,
    ) -> Tensor:
        head = x.shape[1] // heads
        qkv = torch.mm(x, weight.t(), out=_scratch(x, len(weight)))
        out = torch.empty_like(x)
        saved = [x, weight]
        for (batch, length), rows, mixed in _split(groups, qkv, out):
            packed = qkv.new_empty(3, batch, heads, length, head)
            by_token = rows.view(batch, length, 3, heads, head).permute(2, 0, 3, 1, 4)
            torch.add(by_token, bias.view(3, 1, heads, 1, head), out=packed)
            query, key, value = packed.view(3, batch * heads, length, head)
            weights = torch.softmax(_scaled(query, key), dim=-1)
            heads_out = torch.bmm(weights, value).view(batch, heads, length, head)
            mixed.view(batch, length, heads, head).copy_(heads_out.transpose(1, 2))
            saved += [packed, weights]
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.heads = groups, heads
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        heads, head = ctx.heads, grad.shape[1] // ctx.heads
        x, weight, *packed_and_weights = ctx.saved_tensors
        grad_qkv = _scratch(grad, len(weight))
        saved = iter(packed_and_weights)
        for (batch, length), rows, mixed in _split(ctx.groups, grad_qkv, grad):
            packed, weights = next(saved), next(saved)
            query, key, value = packed.view(3, batch * heads, length, head)
            by_head = mixed.view(batch, length, heads, head).transpose(1, 2)
            by_head = by_head.reshape(batch * heads, length, head)
            grad_packed = torch.empty_like(packed)
            grad_query, grad_key, grad_value = grad_packed.view(3, batch * heads, length, head)
            torch.bmm(weights.transpose(1, 2), by_head, out=grad_value)
            grad_weights = torch.bmm(by_head, value.transpose(1, 2))
            scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            scores.mul_(head**-0.5)
            torch.bmm(scores, key, out=grad_query)
            torch.bmm(scores.transpose(1, 2), query, out=grad_key)
            by_token = rows.view(batch, length, 3, heads, head)
            by_token.copy_(grad_packed.permute(1, 3, 0, 2, 4))
        return grad_qkv @ weight, grad_qkv.t() @ x, _sum_rows(grad_qkv), None, None


class _ProjectAndAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, weight)
        return torch.add(residual, bias).addmm_(x, weight.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x, _sum_rows(grad), grad


class _MlpAndAdd(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor
    ) -> Tensor:
        hidden = (x @ w1.t()).add_(b1)
        ctx.save_for_backward(x, hidden, w1, w2)
        return torch.add(residual, b2).addmm_(_gelu(hidden), w2.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        x, hidden, w1, w2 = ctx.saved_tensors
        activated = _gelu(hidden)
        grad_w2 = grad.t() @ activated
        grad_hidden = torch.mm(grad, w2, out=activated)
        torch.ops.aten.gelu_backward.grad_input(grad_hidden, hidden, grad_input=grad_hidden)
        grad_x = grad_hidden @ w1
        return grad_x, grad_hidden.t() @ x, _sum_rows(grad_hidden), grad_w2, _sum_rows(grad), grad


def _split(groups: Sequence[tuple[int, int]], *packed: Tensor) -> Any:
    """Each group with its own rows of every packed tensor."""
    parts = [tensor.split([batch * length for batch, length in groups]) for tensor in packed]
    return zip(groups, *parts, strict=True)


def _scaled(query: Tensor, key: Tensor) -> Tensor:
    """q k^T / sqrt(d), [n, L, d] -> [n, L, L]."""
    scale = query.shape[-1] ** -0.5
    return torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scale)


def _gelu(hidden: Tensor) -> Tensor:
    return torch.ops.aten.gelu.out(hidden, out=_scratch(hidden, hidden.shape[1]))


def _scratch(like: Tensor, width: int) -> Tensor:
    """Memory for [T, width] that a function fills and has done with before it returns.

    The largest matrices of a step are such; taken anew each time they leave holes in memory. Each
    thread and dtype keeps one piece, as large as was ever asked for.
    """
    size = len(like) * width
    kept: dict[torch.dtype, Tensor] = _SCRATCH.__dict__.setdefault("kept", {})
    if like.dtype not in kept or kept[like.dtype].numel() < size:
        kept[like.dtype] = like.new_empty(size)
    return kept[like.dtype][:size].view(len(like), width)


def _sum_rows(x: Tensor) -> Tensor:
    """[T, D] -> [D]; as a product, which is twice as fast as `sum` on the CPU."""
    return torch.mv(x.t(), x.new_ones(x.shape[0]))
