"""Parameter groups, AdamW, encoder-only clipping (paper A.1), and whether a step is finite.

The device decides whether a step may be taken, for all processes alike.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.distributed import all_reduce_sum, num_processes, process_index, whole
from msn.method.network import Network
from msn.method.schedules import MAEScheduleValues, ScheduleValues


class FiniteCheck:
    """Says no where a number of any process is not finite, and for good after several in a row.

    The host never waits for the answer: it is a tensor that the fused optimiser, the target and
    the buffers read on the device. So weights stay those of the last good step until the host has
    seen what happened.

    Args:
        max_skipped: steps in a row after which no further step is taken, >= 1.

    Attributes:
        skip: 1 where the step is not to be taken, else 0, float32 scalar.
        in_row: bad steps in a row up to now, float32 scalar.
        bad: 1 for each process whose numbers were not finite, float32 [processes].
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.skip = self.in_row = torch.zeros(())
        self.bad = torch.zeros(1)

    @torch.no_grad()
    def judge(self, numbers: Sequence[Tensor]) -> Tensor:
        """Look at this process's scalars (loss, gradient norms) and give `skip`; a collective."""
        device = numbers[0].device
        finite = torch.stack([number.detach().float() for number in numbers]).isfinite().all()
        bad = torch.zeros(num_processes(), device=device)
        bad[process_index()] = 1 - finite.float()
        self.bad = all_reduce_sum(bad)
        in_row = self.in_row.to(device)
        stopped = (in_row >= self.max_skipped).float()
        any_bad = self.bad.amax()
        self.in_row = torch.where(stopped > 0, in_row, (in_row + 1) * any_bad)
        self.skip = torch.maximum(any_bad, stopped)
        return self.skip


class BufferGuard:
    """Puts running statistics back where a step was skipped, which may have spoilt them.

    Args:
        module: whose buffers to keep; all of them are small.
    """

    def __init__(self, module: nn.Module) -> None:
        every = list(module.buffers())
        # Means and spreads, and counters: few launches each, whatever their number.
        parts = ([b for b in every if b.is_floating_point() == real] for real in (True, False))
        self._buffers = [part for part in parts if part]
        self._before = [_joined(part) for part in self._buffers]

    @torch.no_grad()
    def restore_if(self, skip: Tensor) -> None:
        """Undo what happened since this was made, where `skip` is 1."""
        for buffers, before in zip(self._buffers, self._before, strict=True):
            kept = torch.where(skip > 0, before, _joined(buffers))
            parts = kept.split([buffer.numel() for buffer in buffers])
            shaped = [part.view_as(b) for part, b in zip(parts, buffers, strict=True)]
            torch._foreach_copy_(buffers, shaped)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def parameter_groups(network: Network) -> list[dict[str, Any]]:
    """Split what is trained into decayed and never decayed parameters.

    Biases, norms (every 1-D tensor) and prototypes are never decayed; class and mask token and
    learned position embeddings are, as in the released code of MSN and of MAE.

    Returns:
        Groups of AdamW, each with the keys `params` and `use_weight_decay`.
    """
    trained = [p for p in network.learner.parameters() if p.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    free = [parameter for parameter in trained if parameter.ndim <= 1]
    return [
        {"params": decayed, "use_weight_decay": True},
        {"params": [*free, *network.undecayed], "use_weight_decay": False},
    ]


def build_optimizer(
    network: Network, *, betas: tuple[float, float], eps: float, fused: bool
) -> torch.optim.AdamW:
    """AdamW over all that is trained; learning rate and decay come from `set_values` each step.

    Args:
        network: its `learner` and what is `undecayed` are trained; of MSN never the target.
        betas: both in [0, 1).
        eps: > 0.
        fused: one kernel for all parameters; parameters must lie where they will be trained.

    Raises:
        UserError: if `betas` or `eps` is out of range.
    """
    check_adamw(betas=betas, eps=eps)
    # A tensor-free lr of 0 is never used: `set_values` comes before every step.
    groups = parameter_groups(network)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=fused)


def check_adamw(*, betas: tuple[float, float], eps: float) -> None:
    """Refuse, before there is anything to optimise, what `build_optimizer` could not take.

    Raises:
        UserError: if `betas` or `eps` is out of range.
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"method.betas must be two numbers in [0, 1), got {list(betas)}")
    if not eps > 0:
        raise UserError(f"method.eps must be > 0, got {eps}")


def set_values(
    optimizer: torch.optim.Optimizer, values: ScheduleValues | MAEScheduleValues
) -> None:
    """Put a step's learning rate and weight decay into the optimiser."""
    for group in optimizer.param_groups:
        group["lr"] = values.lr
        group["weight_decay"] = values.weight_decay if group["use_weight_decay"] else 0.0


def clip_encoder(encoder: nn.Module, max_norm: float | None) -> Tensor:
    """Clip the global gradient norm of the anchor encoder; prototypes are never clipped.

    Args:
        encoder: the anchor.
        max_norm: > 0, or None to measure without clipping.

    Returns:
        The norm before clipping, scalar, on the device of the gradients (no host synchronisation).
    """
    gradients: Iterable[Tensor] = [p.grad for p in encoder.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(encoder.parameters(), max_norm, norm, foreach=True)
    return whole(norm)
