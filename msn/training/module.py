"""The Lightning module of MSN, and `build_module` for any method; the method is in `msn.method`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msn.data.views import Views, ViewSettings
from msn.errors import UserError
from msn.method import optim
from msn.method.distributed import num_processes, process_index, whole
from msn.method.loss import MSNLoss, power_law_prior
from msn.method.masking import PatchDrop, draw_key, num_kept_patches
from msn.method.network import MSN, ProjectionHead
from msn.method.schedules import Schedule
from msn.method.vit import VisionTransformer
from msn.schema import refuse_unknown, take
from msn.training.base import PretrainingModule, check_patch_size
from msn.training.cost import Flops, Memory, flops_per_image, forecast_memory
from msn.training.mae_module import KIND, MAEModule

_SEEDS = (1 << 63) - 1  # the largest that every generator takes


def build_module(
    *,
    model: Mapping[str, Any],
    method: Mapping[str, Any],
    seed: int,
    chunk_size: int | None,
    compile: bool | str,
) -> PretrainingModule:
    """The module of a method: MAE's if `method.kind` is mae, else MSN's.

    Arguments and errors are those of `PretrainingModule`.
    """
    module = MAEModule if method.get("kind") == KIND else MSNModule
    return module(model=model, method=method, seed=seed, chunk_size=chunk_size, compile=compile)


class MSNModule(PretrainingModule):
    """Pretraining by MSN.

    `method` holds the keywords of `MSNLoss`, `Schedule`, `PatchDrop`, `optim.check_adamw` and
    `method_settings`; seed and step decide which patches are dropped.
    """

    name = "msn"
    network: MSN
    schedule: Schedule | None

    def __init__(self, *, method: Mapping[str, Any], **settings: Any) -> None:
        super().__init__(method=method, **settings)
        own = take("method", method, method_settings)
        self.loss = MSNLoss(prior=method_settings(**own), **take("method", method, MSNLoss))
        self.patch_drop = PatchDrop(**take("method", method, PatchDrop))
        self.clip_grad_norm = own["clip_grad_norm"]
        for encoder in (self.network.anchor, self.network.target):
            encoder.trunk.half_stream = own.get("bf16_stream", False)

    def _build_network(self) -> MSN:
        model, method = self.settings["model"], self.settings["method"]
        refuse_unknown("model", model, VisionTransformer)
        refuse_unknown("method", method, *_METHOD_PARTS, derived=_DERIVED)
        own = take("method", method, method_settings)
        refuse_unknown("method.head", own["head"], ProjectionHead)
        return MSN(
            model=take("model", model, VisionTransformer),
            head=take("method.head", own["head"], ProjectionHead),
            num_prototypes=own["num_prototypes"],
        )

    def plan_schedule(self, *, epochs: int, steps_per_epoch: int) -> None:  # noqa: D102
        numbers = take("method", self.settings["method"], Schedule, derived=_DERIVED)
        self.schedule = Schedule(
            **numbers,
            trunk_apart=self.trunk_apart,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
        )

    @property
    def trunk_apart(self) -> bool:
        """Whether one of the method's keys gives the trunk a learning rate of its own."""
        method = self.settings["method"]
        return any(method.get(key, off) != off for key, off in optim.TRUNK_KEYS.items())

    def check_settings(self, views: ViewSettings, *, batch_size: int, accumulated: int) -> None:
        """See the base."""
        if accumulated != 1:
            raise UserError(
                "trainer.accumulate_grad_batches must be 1: BatchNorm, me-max and Sinkhorn would "
                "see fragments of the batch; chunk_size=N fits a whole batch into less memory "
                "exactly"
            )
        if views.rand_views + views.focal_views == 0:
            raise UserError("data.views.rand_views + data.views.focal_views is 0: must be >= 1")
        patch_size = self.network.anchor.trunk.patch_size
        check_patch_size(views, patch_size)
        num_kept_patches((views.rand_size // patch_size) ** 2, self.patch_drop.patch_drop)
        if batch_size < 2 and self.network.anchor.head.config["use_batch_norm"]:
            raise UserError(
                f"data.global_batch_size={batch_size}: BatchNorm in the projection head needs at "
                "least 2 images; method.head.use_batch_norm=false does without"
            )

    def training_step(self, batch: Views, batch_idx: int) -> dict[str, Any]:
        """See the base; the monitors read the loss terms and the projections."""
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
        """Patches that rand views [R, B, 3, S, S] keep in a step, by default the current one.

        Also draws the anchor's rotary positions, if that is on; the target's never move.
        """
        (rand_views, images), rank = rand.shape[:2], process_index()
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

    def gradient_norms(self) -> list[Tensor]:
        """The anchor's, which is clipped, and the prototypes'."""
        assert self.network.prototypes.grad is not None
        return [
            optim.clip_encoder(self.network.anchor, self.clip_grad_norm),
            whole(self.network.prototypes.grad.norm()),
        ]

    def after_step(self, step: int, skip: Tensor | None) -> None:
        """Update the target, unless the step was skipped."""
        assert self.schedule is not None
        self.network.update_target(self.schedule.at(step).momentum, skip)

    def step_inputs(self, batch: Views, step: int) -> dict[str, Any]:
        """The kept patches, and the sharpening temperature."""
        assert self.schedule is not None
        kept = self.draw_kept_patches(batch.rand, step=step)
        return {
            "kept": None if kept is None else kept.cpu(),
            "sharpen_temperature": self.schedule.at(step).sharpen_temperature,
        }

    def repeat_step(self, views: Views, inputs: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """See the base; reports images with a projection that is not finite."""
        kept = inputs[0]["kept"]
        if kept is not None and kept.ndim > 1:  # one choice per image
            kept = torch.cat([part["kept"] for part in inputs], dim=1)
        if kept is not None:
            kept = kept.to(views.target.device)
        out = self.network(views.target, views.rand, views.focal, kept, self.chunk_size)
        terms = self.loss(
            out.anchor, out.target, self.network.prototypes, inputs[0]["sharpen_temperature"]
        )
        finite = out.anchor.isfinite().all(-1).all(0) & out.target.isfinite().all(-1)
        return terms.loss, ~finite

    def parameter_counts(self) -> dict[str, int]:  # noqa: D102
        return {
            "backbone": sum(p.numel() for p in self.network.anchor.trunk.parameters()),
            "projection head": sum(p.numel() for p in self.network.anchor.head.parameters()),
            "prototypes": self.network.prototypes.numel(),
        }

    def operations(self, views: ViewSettings) -> Flops:  # noqa: D102
        method = self.settings["method"]
        return flops_per_image(
            model=self.settings["model"],
            head=method["head"],
            num_prototypes=method["num_prototypes"],
            patch_drop=method["patch_drop"],
            rand_views=views.rand_views,
            focal_views=views.focal_views,
            rand_size=views.rand_size,
            focal_size=views.focal_side,
        )

    def forecast_memory(self, views: ViewSettings, **how: Any) -> Memory:  # noqa: D102
        drop = self.settings["method"]["patch_drop"]
        return forecast_memory(self.network, views, patch_drop=drop, **how)

    @property
    def description(self) -> dict[str, Any]:
        """The head; files without a kind are MSN's."""
        return {"head": dict(self.network.anchor.head.config)}


def method_settings(
    *,
    num_prototypes: int,
    head: Mapping[str, Any],
    prior_exponent: float,
    clip_grad_norm: float | None,
    bf16_stream: bool = False,
) -> Tensor | None:
    """Check the keys that no other part of the method takes, and build the prior.

    Returns:
        Probabilities [K], or None for the uniform prior of MSN.

    Raises:
        UserError: if a number is out of its range.
    """
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise UserError(f"method.clip_grad_norm must be > 0 or null, got {clip_grad_norm}")
    return power_law_prior(num_prototypes, prior_exponent) if prior_exponent else None


# Keywords of these parts that are computed, not set.
_DERIVED = ("prior", "epochs", "steps_per_epoch", "fused", "trunk_apart")
_METHOD_PARTS = (MSNLoss, Schedule, PatchDrop, optim.build_optimizer, method_settings)
