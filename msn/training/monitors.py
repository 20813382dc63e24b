"""What a run tells while it trains: loss terms, schedules, use of prototypes, speed."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from msn.method.distributed import all_reduce_sum, num_processes
from msn.method.loss import LossTerms
from msn.training.module import MSNModule


class Monitors(Callback):
    """Log every `log_every_n_steps` steps; nothing is computed or synchronised in between.

    Names: `train/*` loss terms, `collapse/*` use of prototypes, `schedule/*`, `speed/*`.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._images = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._since, self._images = time.perf_counter(), 0

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MSNModule)
        assert pl_module.schedule is not None
        terms: LossTerms = outputs["terms"]
        self._images += terms.targets.shape[0] * num_processes()
        if trainer.global_step % trainer.log_every_n_steps and not trainer.is_last_batch:
            return
        values = pl_module.schedule.at(trainer.global_step - 1)
        pl_module.log_dict(
            {
                "train/cross_entropy": terms.cross_entropy,
                "train/me_max": terms.me_max,
                "train/entropy": terms.entropy,
                "train/grad_norm": pl_module.grad_norm,
                "collapse/target_max_prob": terms.targets.max(dim=-1).values.mean(),
                **{f"schedule/{name}": value for name, value in values._asdict().items()},
            }
        )
        shown = {
            "train/loss": terms.loss,
            "collapse/prototypes_used": prototypes_used(terms.targets),
            "speed/images_per_s": self._images / (time.perf_counter() - self._since),
        }
        pl_module.log_dict(shown, prog_bar=True)
        self._since, self._images = time.perf_counter(), 0


def prototypes_used(targets: Tensor) -> Tensor:
    """Prototypes that are the strongest of some image of this batch, over all processes, scalar.

    Args:
        targets: [B, K].
    """
    counts = torch.zeros(targets.shape[1], device=targets.device)
    counts.index_add_(0, targets.argmax(dim=-1), torch.ones(targets.shape[0], device=targets.device))
    return (all_reduce_sum(counts) > 0).sum().float()
