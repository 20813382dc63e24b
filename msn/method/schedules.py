"""Every schedule as a pure function of the step, so that a resumed run needs no replay.

Steps count from 0. As in the released code learning rate and weight decay advance *before* they are
used (step 0 uses progress 1), while momentum and sharpening start at progress 0. A stretched length
that is not whole is cut down to whole steps for the cosines and kept as it is for the ramps.
"""

import math
from typing import NamedTuple

from msn.errors import UserError


class ScheduleValues(NamedTuple):
    """What is in force in one step."""

    lr: float
    weight_decay: float
    momentum: float
    """EMA coefficient of the target, taken after the step."""
    sharpen_temperature: float
    trunk_lr: float | None = None
    """Of the trunk's last layer where the trunk has a rate of its own, else None."""


def linear(step: int, *, start: float, final: float, total_steps: float) -> float:
    """From `start` at step 0 to `final` at `total_steps`, constant afterwards."""
    return start + (final - start) * min(step, total_steps) / total_steps


def cosine(step: int, *, start: float, final: float, total_steps: int) -> float:
    """Half a cosine from `start` at step 0 to `final` at `total_steps`, constant afterwards."""
    progress = min(step, total_steps) / total_steps
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    step: int, *, start: float, peak: float, final: float, warmup_steps: int, total_steps: int
) -> float:
    """Linear from `start` to `peak` over `warmup_steps`, then half a cosine to `final`."""
    if step < warmup_steps:
        return linear(step, start=start, final=peak, total_steps=warmup_steps)
    remaining = max(total_steps - warmup_steps, 1)
    return cosine(step - warmup_steps, start=peak, final=final, total_steps=remaining)


class Schedule:
    """All schedules of a run (paper A.1).

    Args:
        start_lr: learning rate before the warm-up, >= 0.
        lr: peak learning rate, > 0; absolute, never scaled with the batch.
        final_lr: at the end of the (stretched) cosine, >= 0.
        warmup_epochs: >= 0, may be fractional; never stretched.
        weight_decay: at the start, >= 0.
        final_weight_decay: at the end, >= 0.
        momentum: EMA coefficient at the start, in [0, 1].
        final_momentum: at the end, in [0, 1].
        sharpen_temperature: at the start, in (0, 1].
        final_sharpen_temperature: at the end, in (0, 1].
        schedule_stretch: cosines and ramps run over this many times the training, >= 1; the
            released code's 1.25 ends training at 80 % of them, 1.0 lets them finish.
        freeze_epochs: the trunk stays as it is for so long, >= 0, may be fractional; then its
            learning rate rises over as many steps as the warm-up takes.
        trunk_lr_scale: learning rate of the trunk's last layer over that of head and prototypes,
            in (0, 1].
        trunk_apart: whether the trunk has a rate of its own.
        epochs: epochs of training, >= 1.
        steps_per_epoch: >= 1.

    Raises:
        UserError: if a number is out of its range, or the warm-up does not fit the training.
    """

    def __init__(
        self,
        *,
        start_lr: float,
        lr: float,
        final_lr: float,
        warmup_epochs: float,
        weight_decay: float,
        final_weight_decay: float,
        momentum: float,
        final_momentum: float,
        sharpen_temperature: float,
        final_sharpen_temperature: float,
        schedule_stretch: float,
        freeze_epochs: float = 0.0,
        trunk_lr_scale: float = 1.0,
        trunk_apart: bool = False,
        epochs: int,
        steps_per_epoch: int,
    ) -> None:
        _check("lr", lr, lr > 0, "> 0")
        _check("start_lr", start_lr, start_lr >= 0, ">= 0")
        _check("final_lr", final_lr, final_lr >= 0, ">= 0")
        _check("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
        _check("final_weight_decay", final_weight_decay, final_weight_decay >= 0, ">= 0")
        _check("momentum", momentum, 0 <= momentum <= 1, "in [0, 1]")
        _check("final_momentum", final_momentum, 0 <= final_momentum <= 1, "in [0, 1]")
        for name, value in {
            "sharpen_temperature": sharpen_temperature,
            "final_sharpen_temperature": final_sharpen_temperature,
        }.items():
            _check(name, value, 0 < value <= 1, "in (0, 1]")
        _check("schedule_stretch", schedule_stretch, schedule_stretch >= 1, ">= 1")
        _check("freeze_epochs", freeze_epochs, freeze_epochs >= 0, ">= 0")
        _check("trunk_lr_scale", trunk_lr_scale, 0 < trunk_lr_scale <= 1, "in (0, 1]")
        self.steps_per_epoch = steps_per_epoch
        self.ramp_steps = schedule_stretch * epochs * steps_per_epoch
        self.total_steps = int(self.ramp_steps)
        self.warmup_steps = _warmup_steps(warmup_epochs, epochs, steps_per_epoch)
        self.frozen_steps = int(freeze_epochs * steps_per_epoch)
        if self.frozen_steps + self.warmup_steps >= epochs * steps_per_epoch and freeze_epochs:
            raise UserError(
                f"a frozen trunk for {freeze_epochs} epochs and its warm-up of {warmup_epochs} do "
                f"not fit a training of {epochs} epochs: lower method.freeze_epochs or "
                "method.warmup_epochs, or raise trainer.max_epochs"
            )
        self._trunk_scale = trunk_lr_scale if trunk_apart else None
        self._lr = (start_lr, lr, final_lr)
        self._weight_decay = (weight_decay, final_weight_decay)
        self._momentum = (momentum, final_momentum)
        self._sharpen = (sharpen_temperature, final_sharpen_temperature)

    def at(self, step: int) -> ScheduleValues:
        """Values in force in a step, counted from 0."""
        start, peak, final = self._lr
        total = self.total_steps
        lr = warmup_cosine(
            step + 1,
            start=start,
            peak=peak,
            final=final,
            warmup_steps=self.warmup_steps,
            total_steps=total,
        )
        return ScheduleValues(
            lr=lr,
            weight_decay=cosine(
                step + 1,
                start=self._weight_decay[0],
                final=self._weight_decay[1],
                total_steps=total,
            ),
            momentum=linear(
                step, start=self._momentum[0], final=self._momentum[1], total_steps=self.ramp_steps
            ),
            sharpen_temperature=linear(
                step, start=self._sharpen[0], final=self._sharpen[1], total_steps=self.ramp_steps
            ),
            trunk_lr=None if self._trunk_scale is None else lr * self._trunk_share(step),
        )

    def _trunk_share(self, step: int) -> float:
        assert self._trunk_scale is not None
        followed = step + 1 - self.frozen_steps  # steps with a trunk that is trained, this one too
        return self._trunk_scale * min(max(followed, 0) / max(self.warmup_steps, 1), 1.0)


class MAEScheduleValues(NamedTuple):
    """What is in force in one step of masked autoencoders."""

    lr: float
    weight_decay: float


class MAESchedule:
    """The schedules of masked autoencoders (arXiv 2111.06377, Table 8): a warm-up, then a cosine.

    As in the released code step 0 uses progress 0, so it trains with `start_lr`.

    Args:
        start_lr: learning rate at step 0, >= 0.
        lr: peak learning rate, > 0; absolute, never scaled with the batch.
        final_lr: at the end, >= 0.
        warmup_epochs: >= 0, may be fractional.
        weight_decay: constant, >= 0.
        epochs: epochs of training, >= 1.
        steps_per_epoch: of the optimiser, >= 1.

    Raises:
        UserError: if a number is out of its range, or the warm-up does not fit the training.
    """

    def __init__(
        self,
        *,
        start_lr: float,
        lr: float,
        final_lr: float,
        warmup_epochs: float,
        weight_decay: float,
        epochs: int,
        steps_per_epoch: int,
    ) -> None:
        _check("lr", lr, lr > 0, "> 0")
        _check("start_lr", start_lr, start_lr >= 0, ">= 0")
        _check("final_lr", final_lr, final_lr >= 0, ">= 0")
        _check("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = epochs * steps_per_epoch
        self.warmup_steps = _warmup_steps(warmup_epochs, epochs, steps_per_epoch)
        self._lr = (start_lr, lr, final_lr)
        self._weight_decay = weight_decay

    def at(self, step: int) -> MAEScheduleValues:
        """Values in force in a step, counted from 0."""
        start, peak, final = self._lr
        lr = warmup_cosine(
            step,
            start=start,
            peak=peak,
            final=final,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )
        return MAEScheduleValues(lr, self._weight_decay)


def _warmup_steps(warmup_epochs: float, epochs: int, steps_per_epoch: int) -> int:
    _check("warmup_epochs", warmup_epochs, warmup_epochs >= 0, ">= 0")
    steps = int(warmup_epochs * steps_per_epoch)
    if steps >= epochs * steps_per_epoch and warmup_epochs > 0:
        raise UserError(
            f"a warm-up of {warmup_epochs} epochs does not fit a training of {epochs} epochs: "
            f"lower method.warmup_epochs or raise trainer.max_epochs"
        )
    return steps


def _check(name: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"method.{name} must be {allowed}, got {value}")
