"""What a run tells while it trains: loss terms, use of prototypes, features, schedules, speed."""

from functools import cache
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from msn.data.views import Views
from msn.method.distributed import num_processes, whole
from msn.training.cost import flops_per_image, measure_matrix_rate
from msn.training.module import MSNModule
from msn.training.statistics import (
    Bucket,
    StepClock,
    StepMeans,
    Window,
    step_scalars,
    strongest_prototypes,
)

# What a precision multiplies matrices in.
_DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.bfloat16,
}


class Monitors(Callback):
    """Log every `log_every_n_steps` steps and at the end of an epoch, over all processes.

    In between figures are added up on the device; nothing is reduced or brought to the host. Names:
    `train/*`, `collapse/*` (use of prototypes), `features/*`, `schedule/*`, `speed/*`; the table in
    docs/monitoring.md says what each is.

    Attributes:
        latest: what was logged last.
        rows: what was logged in this epoch, oldest first.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self._means = StepMeans()
        self._window: Window | None = None
        self._features: Tensor | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._images = 0
        self._seconds = self._matrix_rate = self._flops = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        assert isinstance(pl_module, MSNModule)
        # The target trunk's class tokens pass here anyway: features without a further pass.
        self._hook = pl_module.network.target.head.register_forward_pre_hook(self._keep_features)
        self._matrix_rate = matrix_rate(pl_module.device, _DTYPES[trainer.precision])
        self._clock = StepClock(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._hook is not None:
            self._hook.remove()

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.rows = []
        self._images = 0
        self._clock.restart()

    def on_train_batch_start(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.step_begins()

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MSNModule)
        self._clock.step_ends()
        self._add(pl_module, outputs, batch)
        self._images += batch.target.shape[0] * num_processes()
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % interval and not trainer.is_last_batch:
            return
        assert self._window is not None
        self.latest = {
            "epoch": trainer.current_epoch,
            **_to_host(self._means.take() | self._window.figures()),
            **_scheduled(pl_module, trainer.global_step - 1),
            **self._speed(),  # after values have reached the host, so that the work is timed
        }
        self.rows.append(self.latest)
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=trainer.global_step)

    @torch.no_grad()
    def _add(self, module: MSNModule, outputs: Any, batch: Views) -> None:
        terms, features = outputs["terms"], self._features
        assert features is not None
        prototypes = whole(module.network.prototypes)
        if not self._flops:
            self._flops = _flops_per_image(module, batch)
        if self._window is None:
            self._window = Window(prototypes.shape[0], features.shape[1])
        strongest = terms.targets.argmax(dim=-1)
        nearest = strongest_prototypes(outputs["projections"].anchor, prototypes)
        scalars = step_scalars(terms, nearest, strongest, batch.rand.shape[0])
        self._means.add({**scalars, "train/grad_norm": module.grad_norm})
        self._window.add(terms, strongest, features, processes=num_processes())
        self._features = None

    def _speed(self) -> dict[str, float]:
        seconds, waiting = self._clock.read()
        self._seconds += seconds
        rate = self._images / seconds
        speed = {
            "speed/hours": self._seconds / 3600,
            "speed/images_per_s": rate,
            "speed/data_wait": waiting,
            "speed/mfu": rate / num_processes() * self._flops / self._matrix_rate,
        }
        self._images = 0
        self._clock.restart()
        return speed

    def _keep_features(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0].detach().flatten(0, -2)

    def state_dict(self) -> dict[str, Any]:
        """Sums and window, plain: a run resumed within an interval logs what it would have."""
        window = self._window
        return {
            "seconds": self._seconds,
            "means": (self._means.names, self._means.sums, self._means.steps),
            "window": None
            if window is None
            else (window.num_prototypes, window.width, *map(_plain, (window.older, window.newer))),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was added up before the checkpoint."""
        self._seconds = state_dict["seconds"]
        means = self._means
        means.names, means.sums, means.steps = state_dict["means"]
        if state_dict["window"] is not None:
            num_prototypes, width, older, newer = state_dict["window"]
            self._window = Window(num_prototypes, width)
            self._window.older = None if older is None else Bucket(*older)
            self._window.newer = None if newer is None else Bucket(*newer)


def _to_host(figures: dict[str, Tensor]) -> dict[str, float]:
    """All figures in one copy."""
    values = torch.stack([value.float() for value in figures.values()])
    return dict(zip(figures, values.tolist(), strict=True))


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """`measure_matrix_rate`, once a process."""
    return measure_matrix_rate(device, dtype)


def _flops_per_image(module: MSNModule, batch: Views) -> float:
    method = module.settings["method"]
    return flops_per_image(
        model=module.settings["model"],
        head=method["head"],
        num_prototypes=method["num_prototypes"],
        patch_drop=method["patch_drop"],
        rand_views=batch.rand.shape[0],
        focal_views=batch.focal.shape[0],
        rand_size=batch.target.shape[-1],
        focal_size=batch.focal.shape[-1],
    ).total


def _scheduled(module: MSNModule, step: int) -> dict[str, float]:
    assert module.schedule is not None
    return {f"schedule/{name}": value for name, value in module.schedule.at(step)._asdict().items()}


def _plain(bucket: Bucket | None) -> tuple[Any, ...] | None:
    return None if bucket is None else tuple(bucket)
