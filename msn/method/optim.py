"""Parameter groups, AdamW, encoder-only clipping (paper A.1), and the check of finite steps."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.distributed import all_reduce_sum, num_processes, process_index, whole
from msn.method.network import Network
from msn.method.schedules import MAEScheduleValues, ScheduleValues

# Settings that give the trunk its own learning rate, and their values that do not.
TRUNK_KEYS = {"freeze_epochs": 0, "trunk_lr_scale": 1, "layer_decay": 1}


class FiniteCheck:
    """Decides on the device, for all processes, whether a step is finite and may be taken.

    The fused optimiser, the target and the buffers read the decision on the device, so the host
    never waits. After several bad steps in a row all further steps are skipped, so that the weights
    stay until the host notices.

    Args:
        max_skipped: bad steps in a row after which all are skipped, >= 1.

    Attributes:
        skip: 1 if the step must be skipped, else 0, float32 scalar.
        in_row: number of bad steps in a row, float32 scalar.
        bad: 1 for each process with non-finite numbers, float32 [processes].
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.skip = self.in_row = torch.zeros(())
        self.bad = torch.zeros(1)

    @torch.no_grad()
    def judge(self, numbers: Sequence[Tensor]) -> Tensor:
        """Check this process's scalars (loss, gradient norms) and return `skip`; a collective."""
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
    """Restores a module's buffers (running statistics) if the step was skipped."""

    def __init__(self, module: nn.Module) -> None:
        every = list(module.buffers())
        # Two groups, floats and counters, for few launches.
        parts = ([b for b in every if b.is_floating_point() == real] for real in (True, False))
        self._buffers = [part for part in parts if part]
        self._before = [_joined(part) for part in self._buffers]

    @torch.no_grad()
    def restore_if(self, skip: Tensor) -> None:
        """Restore the buffers as of the construction, if `skip` is 1."""
        for buffers, before in zip(self._buffers, self._before, strict=True):
            kept = torch.where(skip > 0, before, _joined(buffers))
            parts = kept.split([buffer.numel() for buffer in buffers])
            shaped = [part.view_as(b) for part, b in zip(parts, buffers, strict=True)]
            torch._foreach_copy_(buffers, shaped)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def parameter_groups(
    network: Network, *, layer_decay: float = 1.0, trunk_apart: bool = False
) -> list[dict[str, Any]]:
    """Split what is trained into decayed and never decayed parameters.

    Biases, norms (every 1-D tensor) and prototypes are never decayed; class and mask token and
    learned position embeddings are, as in the released code of MSN and of MAE.

    Args:
        network: with its `learner` and `undecayed` parameters.
        layer_decay: factor of the learning rate per layer of the trunk towards the input, counted
            as in timm: tokens with their embedding, then the blocks, the last one with the norm.
        trunk_apart: whether the trunk's layers are separate groups with a key `lr_scale`.

    Returns:
        Groups of AdamW, each with the keys `params` and `use_weight_decay`.
    """
    depth = network.backbone.depth
    groups: dict[tuple[float | None, bool], list[Tensor]] = {(None, True): [], (None, False): []}
    for name, parameter in network.learner.named_parameters():
        scale = None
        if trunk_apart and name.startswith("trunk."):
            scale = layer_decay ** (depth - _layer(name.removeprefix("trunk."), depth))
        if parameter.requires_grad:
            groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    groups[None, False] += network.undecayed
    return [
        {"params": members, "use_weight_decay": decays}
        | ({} if scale is None else {"lr_scale": scale})
        for (scale, decays), members in groups.items()
    ]


def _layer(name: str, depth: int) -> int:
    """Layer of a trunk's parameter: 0 for tokens and patches, then the blocks and the norm."""
    part, *rest = name.split(".")
    if part == "blocks":
        return int(rest[0]) + 1
    return depth if part == "norm" else 0


def build_optimizer(
    network: Network,
    *,
    betas: tuple[float, float],
    eps: float,
    fused: bool,
    layer_decay: float = 1.0,
    trunk_apart: bool = False,
) -> torch.optim.AdamW:
    """AdamW over all trained parameters; `set_values` sets learning rate and decay in each step.

    Args:
        network: with its `learner` and `undecayed` parameters.
        betas: both in [0, 1).
        eps: > 0.
        fused: one kernel for all parameters, which must be on the training device.
        layer_decay: in (0, 1], see `parameter_groups`.
        trunk_apart: whether the trunk has a learning rate of its own.

    Raises:
        UserError: if `betas`, `eps` or `layer_decay` is out of range.
    """
    check_adamw(betas=betas, eps=eps, layer_decay=layer_decay)
    groups = parameter_groups(network, layer_decay=layer_decay, trunk_apart=trunk_apart)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=fused)


def check_adamw(*, betas: tuple[float, float], eps: float, layer_decay: float = 1.0) -> None:
    """Raise a UserError if a setting of `build_optimizer` is out of range."""
    if not 0 < layer_decay <= 1:
        raise UserError(f"method.layer_decay must be in (0, 1], got {layer_decay}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"method.betas must be two numbers in [0, 1), got {list(betas)}")
    if not eps > 0:
        raise UserError(f"method.eps must be > 0, got {eps}")


def set_values(
    optimizer: torch.optim.Optimizer, values: ScheduleValues | MAEScheduleValues
) -> None:
    """Put a step's learning rates and weight decay into the optimiser."""
    trunk_lr = values.trunk_lr if isinstance(values, ScheduleValues) else None
    for group in optimizer.param_groups:
        apart = trunk_lr is not None and "lr_scale" in group
        group["lr"] = trunk_lr * group["lr_scale"] if apart else values.lr
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
