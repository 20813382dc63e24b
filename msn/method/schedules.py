"""Schedules of MSN and MAE as pure functions of the step, so that a resumed run needs no replay.

Steps count from 0. As in the released code learning rate and weight decay advance *before* they are
used (step 0 uses progress 1), while momentum and sharpening start at progress 0. A stretched length
that is not whole is cut down to whole steps for the cosines and kept as it is for the ramps.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from msn.errors import UserError
from msn.schema import Range, check_ranges

_Positive = Annotated[float, Range(0, above_low=True)]
_NotNegative = Annotated[float, Range(0)]
_Fraction = Annotated[float, Range(0, 1)]
_PositiveFraction = Annotated[float, Range(0, 1, above_low=True)]


class ScheduleValues(NamedTuple):
    """Values in force in one step of MSN."""

    lr: float
    weight_decay: float
    momentum: float  # EMA coefficient of the target, used after the step
    sharpen_temperature: float
    trunk_lr: float | None = None  # of the trunk's last layer, if the trunk has its own rate


class MAEScheduleValues(NamedTuple):
    """Values in force in one step of MAE."""

    lr: float
    weight_decay: float


def linear(step: int, start: float, final: float, total_steps: float) -> float:
    """From `start` at step 0 to `final` at `total_steps`, constant afterwards."""
    return start + (final - start) * min(step, total_steps) / total_steps


def cosine(step: int, start: float, final: float, total_steps: int) -> float:
    """Half a cosine from `start` at step 0 to `final` at `total_steps`, constant afterwards."""
    progress = min(step, total_steps) / total_steps
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_length(warmup_epochs: float | None, epochs: int) -> float:
    """Epochs of the warm-up of a training of `epochs`."""
    return epochs / 20 if warmup_epochs is None else warmup_epochs


@dataclass(frozen=True, kw_only=True)
class _WarmupCosine:
    """The learning rate of both methods: a linear warm-up, then half a cosine."""

    start_lr: _NotNegative  # before the warm-up
    lr: _Positive  # peak; absolute, never scaled with the batch
    final_lr: _NotNegative  # at the end of the cosine
    # May be fractional, is never stretched; None: a twentieth of the training.
    warmup_epochs: Annotated[float | None, Range(0)]
    weight_decay: _NotNegative  # at the start
    epochs: int  # of the training, >= 1
    steps_per_epoch: int  # of the optimiser, >= 1

    def __post_init__(self) -> None:
        check_ranges("method", self)
        if self.warmup_steps >= self.epochs * self.steps_per_epoch and self.warmup_steps:
            raise UserError(
                f"a warm-up of {self.warmup_epochs} epochs does not fit a training of "
                f"{self.epochs} epochs: lower method.warmup_epochs or raise trainer.max_epochs"
            )

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return int(warmup_length(self.warmup_epochs, self.epochs) * self.steps_per_epoch)

    def _lr_at(self, step: int, total_steps: int) -> float:
        warmup = self.warmup_steps
        if step < warmup:
            return linear(step, self.start_lr, self.lr, warmup)
        return cosine(step - warmup, self.lr, self.final_lr, max(total_steps - warmup, 1))


@dataclass(frozen=True, kw_only=True)
class Schedule(_WarmupCosine):
    """All schedules of an MSN run (paper A.1).

    Raises:
        UserError: if a number is out of its range, or the warm-up does not fit the training.
    """

    final_weight_decay: _NotNegative
    momentum: _Fraction  # EMA coefficient at the start
    final_momentum: _Fraction
    sharpen_temperature: _PositiveFraction  # at the start
    final_sharpen_temperature: _PositiveFraction
    # Cosines and ramps run over this many times the training; the released code's 1.25 ends
    # training at 80 % of them, 1.0 lets them finish.
    schedule_stretch: Annotated[float, Range(1)]
    # Epochs, also fractional, for which the trunk is frozen; then its learning rate rises over as
    # many steps as the warm-up takes.
    freeze_epochs: _NotNegative = 0.0
    # Learning rate of the trunk's last layer over that of head and prototypes.
    trunk_lr_scale: _PositiveFraction = 1.0
    trunk_apart: bool = False  # whether the trunk has a learning rate of its own

    def __post_init__(self) -> None:
        super().__post_init__()
        training = self.epochs * self.steps_per_epoch
        if self.frozen_steps + self.warmup_steps >= training and self.freeze_epochs:
            warmup = warmup_length(self.warmup_epochs, self.epochs)
            raise UserError(
                f"a frozen trunk for {self.freeze_epochs} epochs and its warm-up of {warmup} do "
                f"not fit a training of {self.epochs} epochs: lower method.freeze_epochs or "
                "method.warmup_epochs, or raise trainer.max_epochs"
            )

    @property
    def frozen_steps(self) -> int:
        """Steps in which the trunk is frozen."""
        return int(self.freeze_epochs * self.steps_per_epoch)

    def at(self, step: int) -> ScheduleValues:
        """Values in force in a step, counted from 0."""
        ramp = self.schedule_stretch * self.epochs * self.steps_per_epoch
        total = int(ramp)
        lr = self._lr_at(step + 1, total)
        return ScheduleValues(
            lr=lr,
            weight_decay=cosine(step + 1, self.weight_decay, self.final_weight_decay, total),
            momentum=linear(step, self.momentum, self.final_momentum, ramp),
            sharpen_temperature=linear(
                step, self.sharpen_temperature, self.final_sharpen_temperature, ramp
            ),
            trunk_lr=lr * self._trunk_share(step) if self.trunk_apart else None,
        )

    def _trunk_share(self, step: int) -> float:
        followed = step + 1 - self.frozen_steps  # steps with a trunk that is trained, this one too
        return self.trunk_lr_scale * min(max(followed, 0) / max(self.warmup_steps, 1), 1.0)


class MAESchedule(_WarmupCosine):
    """The schedules of MAE (arXiv 2111.06377, Table 8): learning rate; weight decay is constant.

    As in the released code step 0 uses progress 0, so it trains with `start_lr`.

    Raises:
        UserError: if a number is out of its range, or the warm-up does not fit the training.
    """

    def at(self, step: int) -> MAEScheduleValues:
        """Values in force in a step, counted from 0."""
        lr = self._lr_at(step, self.epochs * self.steps_per_epoch)
        return MAEScheduleValues(lr, self.weight_decay)
