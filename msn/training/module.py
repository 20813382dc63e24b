"""The thin LightningModule: which call happens when; the method itself is in `msn.method`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from msn.data.views import Views, ViewSettings
from msn.errors import UserError
from msn.method import optim
from msn.method.distributed import num_processes, process_index, whole
from msn.method.loss import MSNLoss, power_law_prior
from msn.method.masking import PatchDrop, draw_key, num_kept_patches
from msn.method.network import MSN, ProjectionHead
from msn.method.optim import BufferGuard, FiniteCheck
from msn.method.schedules import Schedule
from msn.method.vit import VisionTransformer
from msn.schema import refuse_unknown, take
from msn.training.strategy import compilation, make_fast, shard, whole_state

CHECKPOINT_FORMAT = 1
_SEEDS = (1 << 63) - 1  # the largest that every generator takes


class MSNModule(LightningModule):
    """MSN pretraining under Lightning's automatic optimisation.

    Args:
        model: the six numbers of `msn.method.vit.VisionTransformer`.
        method: every number of the method: keywords of `MSNLoss`, `Schedule`, `PatchDrop` and
            `optim.build_optimizer`, and num_prototypes, head, prior_exponent, clip_grad_norm.
        seed: decides, with the step, which patches are dropped.
        chunk_size: images per trunk pass under activation checkpointing; None takes all at once.
        compile: compile the blocks: true, false, or "auto" (on CUDA).

    Raises:
        UserError: if a key is unknown or missing, or a value is out of its range.
    """

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        method: Mapping[str, Any],
        seed: int,
        chunk_size: int | None,
        compile: bool | str,
    ) -> None:
        super().__init__()
        self._compilation = compilation(compile)
        if chunk_size is not None and chunk_size < 1:
            raise UserError(f"chunk_size must be >= 1 image or null, got {chunk_size}")
        refuse_unknown("model", model, VisionTransformer)
        refuse_unknown("method", method, *_METHOD_PARTS, derived=_DERIVED)
        own = take("method", method, method_settings)
        refuse_unknown("method.head", own["head"], ProjectionHead)
        self.settings: dict[str, Any] = {"model": dict(model), "method": dict(method), "seed": seed}
        self.network = MSN(
            model=take("model", model, VisionTransformer),
            head=take("method.head", own["head"], ProjectionHead),
            num_prototypes=own["num_prototypes"],
        )
        prior = method_settings(**own)
        self.loss = MSNLoss(prior=prior, **take("method", method, MSNLoss))
        self.patch_drop = PatchDrop(**take("method", method, PatchDrop))
        optim.check_adamw(**take("method", method, optim.check_adamw))
        self.clip_grad_norm = own["clip_grad_norm"]
        self.chunk_size = chunk_size
        self.schedule: Schedule | None = None
        self.checkpoint_info: dict[str, Any] = {}
        self.grad_norm = self.loss_value = torch.zeros(())
        self.finite_check: FiniteCheck | None = None  # see `msn.training.guard`

    def plan_schedule(self, *, epochs: int, steps_per_epoch: int) -> None:
        """Fix the training's length; fails early where the warm-up does not fit.

        Raises:
            UserError: if a schedule's number is out of range or the warm-up is too long.
        """
        numbers = take("method", self.settings["method"], Schedule, derived=_DERIVED)
        self.schedule = Schedule(**numbers, epochs=epochs, steps_per_epoch=steps_per_epoch)

    def configure_model(self) -> None:
        """Cut the network over the processes where the strategy wants that."""
        if self.device_mesh is not None and not isinstance(self.network, FSDPModule):
            shard(self.network, self.device_mesh["data_parallel"])

    def make_whole(self) -> None:
        """Put a network that was cut together again, on every process."""
        if isinstance(self.network, FSDPModule):
            state = whole_state(self.network)
            device = self.device
            method = self.settings["method"]
            self.network = MSN(
                model=take("model", self.settings["model"], VisionTransformer),
                head=take("method.head", method["head"], ProjectionHead),
                num_prototypes=method["num_prototypes"],
            ).to(device, state["prototypes"].dtype)
            self.network.load_state_dict(state)

    def check_views(self, views: ViewSettings) -> None:
        """Fail early on views that the network cannot take.

        Raises:
            UserError: if they are cut for another patch, or a rand view would keep no patch.
        """
        patch_size = self.network.anchor.trunk.patch_size
        if views.patch_size != patch_size:
            raise UserError(
                f"data.views.patch_size={views.patch_size}: must be model.patch_size={patch_size}"
            )
        num_kept_patches((views.rand_size // patch_size) ** 2, self.patch_drop.patch_drop)

    def check_batch(self, images: int) -> None:
        """Fail early on a batch over which BatchNorm cannot normalise.

        Args:
            images: of all processes, whose views of a size make the statistics together.

        Raises:
            UserError: if there is one image, hence one target view.
        """
        if images < 2 and self.network.anchor.head.config["use_batch_norm"]:
            raise UserError(
                f"data.global_batch_size={images}: BatchNorm in the projection head needs at least "
                "2 images; method.head.use_batch_norm=false does without"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over anchor and prototypes in one fused kernel."""
        numbers = take("method", self.settings["method"], optim.check_adamw)
        return optim.build_optimizer(self.network, **numbers, fused=True)

    def on_fit_start(self) -> None:
        """Compile the blocks where the network now lies."""
        self.make_fast(self.device)

    def make_fast(self, device: torch.device) -> bool:
        """Prepare the network for steps on a device, see `msn.training.strategy.make_fast`."""
        return make_fast(self.network, device, wanted=self._compilation)

    def on_train_epoch_start(self) -> None:
        """Put the target into train mode too: its head normalises by its own batches (A.1).

        Lightning keeps whatever mode a module was left in.
        """
        self.network.train()

    def training_step(self, batch: Views, batch_idx: int) -> dict[str, Any]:
        """Loss of one batch of views; its terms go to the monitors as they are, on the device."""
        assert self.schedule is not None
        kept = self.draw_kept_patches(batch.rand)
        out = self.network(batch.target, batch.rand, batch.focal, kept, self.chunk_size)
        values = self.schedule.at(self.global_step)
        terms = self.loss(
            out.anchor, out.target, self.network.prototypes, values.sharpen_temperature
        )
        self.loss_value = terms.loss.detach()
        return {"loss": terms.loss, "terms": terms, "projections": out}

    def draw_kept_patches(self, rand: Tensor, step: int | None = None) -> Tensor | None:
        """Patches that rand views [R, B, 3, S, S] keep in a step; None is this one.

        Moves the anchor's rotary positions too, where that is on; the target's never move.
        """
        rand_views, images = rand.shape[:2]
        rank = process_index()
        key = draw_key(self.settings["seed"], self.global_step if step is None else step)
        self.network.anchor.trunk.draw_positions(torch.Generator().manual_seed(~key & _SEEDS))
        kept = self.patch_drop.draw(
            (rand.shape[-1] // self.network.anchor.trunk.patch_size) ** 2,
            rand_views=rand_views,
            images=range(rank * images, (rank + 1) * images),
            global_batch_size=num_processes() * images,
            key=key,
        )
        return None if kept is None else kept.to(rand.device, non_blocking=True)

    def configure_gradient_clipping(  # noqa: D102
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.grad_norm = optim.clip_encoder(self.network.anchor, self.clip_grad_norm)
        if self.finite_check is not None:
            assert self.network.prototypes.grad is not None
            prototype_norm = whole(self.network.prototypes.grad.norm())
            numbers = [self.loss_value, self.grad_norm, prototype_norm]
            # What torch's fused kernels read: they skip the step where it is not 0.
            vars(optimizer)["found_inf"] = self.finite_check.judge(numbers)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set the step's rates, step, then move the target: once per optimiser step, after it."""
        assert self.schedule is not None
        values = self.schedule.at(self.global_step)
        optim.set_values(optimizer, values)
        before = None if self.finite_check is None else BufferGuard(self.network)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.network.zero_grad()  # not left to stand beside the next step's activations
        if self.finite_check is None or before is None:
            self.network.update_target(values.momentum)
            return
        self.network.update_target(values.momentum, self.finite_check.skip)
        before.restore_if(self.finite_check.skip)

    @property
    def finished_epochs(self) -> int:
        """Epochs whose every step is done; Lightning counts one only after its checkpoint."""
        if self.schedule is None:  # of weights that no trainer has planned anything for
            return self.current_epoch
        return self.global_step // self.schedule.steps_per_epoch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the weights in plain data, so that other programs need not guess."""
        checkpoint["msn"] = {
            "format": CHECKPOINT_FORMAT,
            "epoch": self.finished_epochs,
            "head": dict(self.network.anchor.head.config),
            **self.settings,
            **self.checkpoint_info,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the licence that the run's first weights came with."""
        if licence := checkpoint.get("msn", {}).get("licence"):
            self.checkpoint_info["licence"] = licence


def method_settings(
    *,
    num_prototypes: int,
    head: Mapping[str, Any],
    prior_exponent: float,
    clip_grad_norm: float | None,
) -> Tensor | None:
    """Check what no other part of the method takes, and give the prior over prototypes.

    Returns:
        Probabilities [K], or None for the uniform prior of MSN.

    Raises:
        UserError: if a number is out of its range.
    """
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise UserError(f"method.clip_grad_norm must be > 0 or null, got {clip_grad_norm}")
    return power_law_prior(num_prototypes, prior_exponent) if prior_exponent else None


# Keywords of the parts that are computed, not set.
_DERIVED = ("prior", "epochs", "steps_per_epoch", "fused")
_METHOD_PARTS = (MSNLoss, Schedule, PatchDrop, optim.build_optimizer, method_settings)
