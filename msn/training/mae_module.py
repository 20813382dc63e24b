"""The Lightning module of MAE; the method is in `msn.method.mae`."""

from typing import Any

import torch
from torch import Tensor

from msn.data.views import Views, ViewSettings, draw_noise
from msn.errors import UserError
from msn.method import optim
from msn.method.mae import MAE, Decoder
from msn.method.schedules import MAESchedule
from msn.method.vit import VisionTransformer
from msn.schema import refuse_unknown, take
from msn.training.base import PretrainingModule, check_patch_size
from msn.training.cost import MAEFlops, Memory, forecast_mae_memory, mae_flops_per_image

KIND = "mae"  # what `method.kind` says


class MAEModule(PretrainingModule):
    """Pretraining by MAE.

    `method` holds the keywords of `MAESchedule` and `optim.check_adamw`, and kind, mask_ratio,
    norm_pix_loss and decoder; seed, epoch and image decide which patches are masked.
    """

    name = KIND
    reads_pixels = True
    network: MAE
    schedule: MAESchedule | None

    def _build_network(self) -> MAE:
        model, method = self.settings["model"], self.settings["method"]
        refuse_unknown("model", model, VisionTransformer)
        _refuse_unknown_method(method)
        own = take("method", method, _method_settings)
        refuse_unknown("method.decoder", own["decoder"], Decoder)
        return MAE(
            model=take("model", model, VisionTransformer),
            decoder=take("method.decoder", own["decoder"], Decoder),
            mask_ratio=own["mask_ratio"],
            norm_pix_loss=own["norm_pix_loss"],
        )

    def plan_schedule(self, *, epochs: int, steps_per_epoch: int) -> None:  # noqa: D102
        numbers = take("method", self.settings["method"], MAESchedule, derived=_DERIVED)
        self.schedule = MAESchedule(**numbers, epochs=epochs, steps_per_epoch=steps_per_epoch)

    def check_settings(self, views: ViewSettings, *, batch_size: int, accumulated: int) -> None:
        """See the base; there is one view, of the model's size."""
        anchors, trunk = views.rand_views + views.focal_views, self.network.trunk
        if anchors:
            raise UserError(
                f"data.views has {anchors} anchor views and method=mae takes none: set "
                "data.views.rand_views=0 data.views.focal_views=0"
            )
        check_patch_size(views, trunk.patch_size)
        if views.rand_size != trunk.img_size:
            raise UserError(
                f"data.views.rand_size={views.rand_size}: must be model.img_size={trunk.img_size}"
            )

    def training_step(self, batch: Views, batch_idx: int) -> dict[str, Any]:
        """See the base; the monitors read the errors."""
        errors = self.network.learn(batch.target, self.draw_noise(batch), self.chunk_size)
        self.loss_value = errors.loss.detach()
        return {"loss": errors.loss, "errors": errors}

    def draw_noise(self, batch: Views) -> Tensor:
        """Noise of the batch, [B, N]; the patches with the greatest noise are masked."""
        assert batch.origin is not None
        trunk, device = self.network.trunk, batch.target.device
        noise = torch.from_numpy(
            draw_noise(
                seed=self.settings["seed"],
                epoch=batch.origin.epoch,
                indices=batch.origin.indices,
                count=(trunk.img_size // trunk.patch_size) ** 2,
            )
        )
        # From pinned memory; otherwise the host waits for the work queued on the device.
        noise = noise.pin_memory() if device.type == "cuda" else noise
        return noise.to(device, non_blocking=True)

    def gradient_norms(self) -> list[Tensor]:
        """That of all parameters, measured and not clipped."""
        return [optim.clip_encoder(self.network, None)]

    def step_inputs(self, batch: Views, step: int) -> dict[str, Any]:
        """The noise that chooses patches."""
        return {"noise": self.draw_noise(batch).cpu()}

    def repeat_step(self, views: Views, inputs: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """See the base; reports images with a patch whose error is not finite."""
        noise = torch.cat([part["noise"] for part in inputs]).to(views.target.device)
        errors = self.network.learn(views.target, noise, self.chunk_size)
        return errors.loss, ~errors.patches.isfinite().all(-1)

    def parameter_counts(self) -> dict[str, int]:  # noqa: D102
        parts = {"backbone": self.network.trunk, "decoder": self.network.decoder}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def operations(self, views: ViewSettings) -> MAEFlops:  # noqa: D102
        return mae_flops_per_image(
            model=self.settings["model"],
            decoder=self.settings["method"]["decoder"],
            num_kept=self.network.num_kept,
        )

    def forecast_memory(self, views: ViewSettings, **how: Any) -> Memory:  # noqa: D102
        return forecast_mae_memory(self.network, **how)


def _method_settings(
    *, kind: str, mask_ratio: float, norm_pix_loss: bool, decoder: dict[str, Any]
) -> None:
    """Schema of the keys that no other part of the method takes."""


def _refuse_unknown_method(method: dict[str, Any]) -> None:
    try:
        refuse_unknown("method", method, *_METHOD_PARTS, derived=_DERIVED)
    except UserError as error:
        presets = "experiment=mae_digits and others, or experiment=null"
        raise UserError(f"{error}; method=mae has presets of its own: {presets}") from None


# Keywords of these parts that are computed, not set.
_DERIVED = ("epochs", "steps_per_epoch", "fused", "layer_decay", "trunk_apart")
_METHOD_PARTS = (_method_settings, MAESchedule, optim.build_optimizer)
