"""The metrics of a run: loss terms, use of prototypes, features, schedules, speed."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from msn.data.views import Views
from msn.method.distributed import num_processes, whole
from msn.method.loss import LossTerms
from msn.method.mae import Errors
from msn.training.base import PretrainingModule
from msn.training.checkpointing import ends_step
from msn.training.cost import measure_matrix_rate
from msn.training.module import MSNModule
from msn.training.statistics import Bucket, StepClock, StepMeans, Window, entropy
from msn.training.trainer import data_of

# Type of matrix products by precision.
_DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-mixed": torch.bfloat16}


class Monitors(Callback):
    """Log every `log_every_n_steps` steps and at the end of an epoch, over all processes.

    In between, figures are summed on the device; nothing is reduced or copied to the host. The
    table in docs/monitoring.md lists all names.

    Attributes:
        latest: the last logged row.
        rows: the logged rows of this epoch, oldest first.
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
        assert isinstance(pl_module, PretrainingModule)
        if isinstance(pl_module, MSNModule):
            # The class tokens of the target's trunk: features without a further pass.
            head = pl_module.network.target.head
            self._hook = head.register_forward_pre_hook(self._keep_features)
        self._flops = pl_module.operations(data_of(trainer).views).total
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
        assert isinstance(pl_module, PretrainingModule)
        self._clock.step_ends()
        self._add(pl_module, outputs, batch)
        self._images += batch.target.shape[0] * num_processes()
        interval = vars(trainer)["log_every_n_steps"]
        if not ends_step(trainer, batch_idx):
            return
        if trainer.global_step % interval and not trainer.is_last_batch:
            return
        assert self._window is not None
        self.latest = {
            "epoch": trainer.current_epoch,
            **_to_host(self._means.take() | self._window.figures(rank=trainer.is_last_batch)),
            **_scheduled(pl_module, trainer.global_step - 1),
            **self._speed(),  # after the copy to the host, so that the work is timed
        }
        self.rows.append(self.latest)
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=trainer.global_step)

    @torch.no_grad()
    def _add(self, module: PretrainingModule, outputs: Any, batch: Views) -> None:
        if isinstance(module, MSNModule):
            terms, features = outputs["terms"], self._features
            assert features is not None
            prototypes = whole(module.network.prototypes)
            strongest = terms.targets.argmax(dim=-1)
            nearest = strongest_prototypes(outputs["projections"].anchor, prototypes)
            scalars = step_scalars(terms, nearest, strongest, batch.rand.shape[0])
            use, self._features = prototype_use(terms, strongest), None
        else:
            scalars, features = mae_scalars(outputs["errors"]), outputs["errors"].class_tokens
            use = features.new_zeros(3, 0)
        if self._window is None:
            self._window = Window(use.shape[1], features.shape[1])
        self._means.add({**scalars, "train/grad_norm": module.grad_norm})
        self._window.add(use, features, processes=num_processes())

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
        """Sums and window as plain data, so that a resume within an interval logs the same."""
        window, plain = self._window, None
        if window is not None:
            buckets = (None if b is None else tuple(b) for b in (window.older, window.newer))
            plain = (window.num_prototypes, window.width, *buckets)
        means = (self._means.names, self._means.sums, self._means.steps)
        return {"seconds": self._seconds, "means": means, "window": plain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._seconds, means = state_dict["seconds"], self._means
        means.names, means.sums, means.steps = state_dict["means"]
        if state_dict["window"] is not None:
            num_prototypes, width, older, newer = state_dict["window"]
            self._window = Window(num_prototypes, width)
            self._window.older = None if older is None else Bucket(*older)
            self._window.newer = None if newer is None else Bucket(*newer)


def _to_host(figures: dict[str, Tensor]) -> dict[str, float]:
    """All figures on the host, in one copy."""
    values = torch.stack([value.float() for value in figures.values()])
    return dict(zip(figures, values.tolist(), strict=True))


matrix_rate = cache(measure_matrix_rate)


def _scheduled(module: PretrainingModule, step: int) -> dict[str, float]:
    assert module.schedule is not None
    values = module.schedule.at(step)._asdict()
    return {f"schedule/{name}": value for name, value in values.items() if value is not None}


def step_scalars(
    terms: LossTerms, anchor_strongest: Tensor, strongest: Tensor, rand_views: int
) -> dict[str, Tensor]:
    """Scalars of a step on this process.

    Args:
        terms: of the loss.
        anchor_strongest: strongest prototype of each anchor view, [V, B], rand views first.
        strongest: of each image's target, [B].
        rand_views: R.
    """
    agreement = (anchor_strongest == strongest).float().mean(dim=1)  # [V]
    scalars = {
        "train/loss": terms.loss,
        "train/cross_entropy": terms.cross_entropy,
        "train/cross_entropy_floor": entropy(terms.targets).mean(),
        "train/me_max": terms.me_max,
        "train/entropy": terms.entropy,
        "collapse/target_max_prob": terms.targets.max(dim=-1).values.mean(),
    }
    if rand_views:
        scalars["collapse/agreement_rand"] = agreement[:rand_views].mean()
    if rand_views < len(agreement):
        scalars["collapse/agreement_focal"] = agreement[rand_views:].mean()
    return scalars


def prototype_use(terms: LossTerms, strongest: Tensor) -> Tensor:
    """Per prototype: images it is strongest in, targets and mean predictions, summed: [3, K]."""
    images, num_prototypes = terms.targets.shape
    ones = torch.ones(images, device=strongest.device)
    counts = torch.zeros(num_prototypes, device=strongest.device).index_add_(0, strongest, ones)
    predictions = terms.mean_prediction.float() * images
    return torch.stack([counts, terms.targets.sum(dim=0).float(), predictions])


def mae_scalars(errors: Errors) -> dict[str, Tensor]:
    """Scalars of an MAE step on this process, over masked patches."""

    def mean(values: Tensor) -> Tensor:
        return (values * errors.mask).sum() / errors.mask.sum()

    loss = errors.loss.detach()
    return {
        "train/loss": loss,
        "reconstruction/error_std": mean((errors.patches.detach() - loss).square()).sqrt(),
        "reconstruction/error_of_means": mean(errors.of_means),
    }


def strongest_prototypes(projections: Tensor, prototypes: Tensor) -> Tensor:
    """Index of the prototype with the largest cosine, [..., P] and [K, P] -> [...]."""
    # The scale of a projection does not matter.
    with torch.autocast(device_type=projections.device.type, enabled=False):
        return (projections.float() @ F.normalize(prototypes.float(), dim=1).T).argmax(dim=-1)
