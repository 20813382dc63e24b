"""What a run tells while it trains: loss terms, schedules, use of prototypes, speed."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from msn.method.distributed import all_reduce_mean, all_reduce_sum, num_processes
from msn.method.loss import LossTerms
from msn.training.module import MSNModule


class Monitors(Callback):
    """Log every `log_every_n_steps` steps and at the end of an epoch.

    Nothing is computed, reduced or brought to the host in between. Names: `train/*` loss terms,
    `collapse/*` use of prototypes, `schedule/*`, `speed/*`.

    Attributes:
        latest: what was logged last.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._since = 0.0
        self._images = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._since, self._images = time.perf_counter(), 0

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MSNModule)
        terms: LossTerms = outputs["terms"]
        self._images += terms.targets.shape[0] * num_processes()
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % interval and not trainer.is_last_batch:
            return
        self.latest = {
            "epoch": trainer.current_epoch,
            **_measured(terms, pl_module.grad_norm),
            **_scheduled(pl_module, trainer.global_step - 1),
            # After the values have reached the host, so that the work itself is timed.
            "speed/images_per_s": self._images / (time.perf_counter() - self._since),
        }
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=trainer.global_step)
        self._since, self._images = time.perf_counter(), 0


def _measured(terms: LossTerms, grad_norm: Tensor) -> dict[str, float]:
    """Means over processes, brought to the host in one copy."""
    named = {
        "train/loss": terms.loss,
        "train/cross_entropy": terms.cross_entropy,
        "train/me_max": terms.me_max,
        "train/entropy": terms.entropy,
        "train/grad_norm": grad_norm,
        "collapse/target_max_prob": terms.targets.max(dim=-1).values.mean(),
        "collapse/prototypes_used": prototypes_used(terms.targets),
    }
    values = torch.stack([value.detach().float() for value in named.values()])
    return dict(zip(named, all_reduce_mean(values).tolist(), strict=True))


def _scheduled(module: MSNModule, step: int) -> dict[str, float]:
    assert module.schedule is not None
    return {f"schedule/{name}": value for name, value in module.schedule.at(step)._asdict().items()}


def prototypes_used(targets: Tensor) -> Tensor:
    """Prototypes that are the strongest of some image of this batch, over all processes, scalar.

    Args:
        targets: [B, K].
    """
    counts = torch.zeros(targets.shape[1], device=targets.device)
    counts.index_add_(
        0, targets.argmax(dim=-1), torch.ones(targets.shape[0], device=targets.device)
    )
    return (all_reduce_sum(counts) > 0).sum().float()
