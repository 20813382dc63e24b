"""The base of the Lightning modules of all methods: one training step and its checkpoint."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from msn.data.views import Views, ViewSettings
from msn.errors import UserError
from msn.method import optim
from msn.method.network import Network
from msn.method.optim import BufferGuard, FiniteCheck
from msn.method.schedules import MAESchedule, Schedule
from msn.schema import take
from msn.training.cost import Memory, Operations
from msn.training.strategy import compilation, make_fast, shard, whole_state

CHECKPOINT_FORMAT = 1


class PretrainingModule(LightningModule, ABC):
    """Pretraining by any method under Lightning's automatic optimisation.

    Args:
        model: the numbers of `msn.method.vit.VisionTransformer`.
        method: every number of the method.
        seed: of all that a step draws.
        chunk_size: images per pass under activation checkpointing; None takes all at once.
        compile: compile the blocks: true, false, or "auto" (on CUDA).

    Raises:
        UserError: if a key is unknown or missing, or a value is out of its range.
    """

    name: ClassVar[str]  # of the method: in tables, and in files unless it is MSN's
    reads_pixels: ClassVar[bool] = False  # whether views stay in full precision under autocast

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
        self.settings: dict[str, Any] = {"model": dict(model), "method": dict(method), "seed": seed}
        self.chunk_size = chunk_size
        self.network = self._build_network()
        optim.check_adamw(**take("method", method, optim.check_adamw))
        self.schedule: Schedule | MAESchedule | None = None
        self.checkpoint_info: dict[str, Any] = {}
        self.grad_norm = self.loss_value = torch.zeros(())
        self.finite_check: FiniteCheck | None = None  # see `msn.training.guard`

    @abstractmethod
    def _build_network(self) -> Network:
        """Check the settings and draw a network."""

    @abstractmethod
    def plan_schedule(self, *, epochs: int, steps_per_epoch: int) -> None:
        """Set the schedule for a training of `epochs` of `steps_per_epoch` optimiser steps.

        Raises:
            UserError: if a schedule's number is out of range or the warm-up is too long.
        """

    @abstractmethod
    def check_settings(self, views: ViewSettings, *, batch_size: int, accumulated: int) -> None:
        """Raise a UserError for views or batches that the method cannot take.

        Args:
            views: of the data.
            batch_size: images per batch, over all processes.
            accumulated: batches per optimiser step.
        """

    @property
    def trunk_apart(self) -> bool:
        """Whether the trunk has a learning rate of its own, see `method.freeze_epochs`."""
        return False

    @abstractmethod
    def training_step(self, batch: Views, batch_idx: int) -> dict[str, Any]:
        """Loss of one batch of views, and what the monitors read, on the device."""

    @abstractmethod
    def gradient_norms(self) -> list[Tensor]:
        """Gradient norms of the learner, which it may clip, and of other trained parameters."""

    def after_step(self, step: int, skip: Tensor | None) -> None:
        """Called after the optimiser step, which was skipped where `skip` is 1."""

    @abstractmethod
    def step_inputs(self, batch: Views, step: int) -> dict[str, Any]:
        """Inputs of a step besides views and weights; plain data."""

    @abstractmethod
    def repeat_step(self, views: Views, inputs: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Repeat the forward pass of a recorded step.

        Args:
            views: of all processes, joined along the images.
            inputs: `step_inputs` of each process.

        Returns:
            The loss, and which images gave non-finite numbers, bool [B].
        """

    @abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, each counted once; the backbone first."""

    @abstractmethod
    def operations(self, views: ViewSettings) -> Operations:
        """Nominal operations of one image in one step, see `msn.training.cost`."""

    @abstractmethod
    def forecast_memory(self, views: ViewSettings, **how: Any) -> Memory:
        """Memory of a step; keywords as of `msn.training.cost.forecast_memory`."""

    def configure_model(self) -> None:
        """Shard the network over the processes if the strategy does."""
        if self.device_mesh is not None and not isinstance(self.network, FSDPModule):
            shard(self.network, self.device_mesh["data_parallel"])

    def make_whole(self) -> None:
        """Gather a sharded network, on every process."""
        if isinstance(self.network, FSDPModule):
            state, dtype = whole_state(self.network), next(self.network.parameters()).dtype
            self.network = self._build_network().to(self.device, dtype)
            self.network.load_state_dict(state)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all that is trained in one fused kernel."""
        numbers = take("method", self.settings["method"], optim.check_adamw)
        return optim.build_optimizer(
            self.network, **numbers, fused=True, trunk_apart=self.trunk_apart
        )

    def on_fit_start(self) -> None:
        """Compile the blocks for the device of the network."""
        self.make_fast(self.device)

    def make_fast(self, device: torch.device) -> bool:
        """Prepare the network for steps on a device, see `msn.training.strategy.make_fast`."""
        return make_fast(self.network, device, wanted=self._compilation)

    def on_train_epoch_start(self) -> None:
        """Put MSN's target into train mode too: its head normalises by its own batches (A.1)."""
        self.network.train()

    def configure_gradient_clipping(  # noqa: D102
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.grad_norm, *others = self.gradient_norms()
        if self.finite_check is not None:
            numbers = [self.loss_value, self.grad_norm, *others]
            # Read by torch's fused kernels, which skip the step if it is not 0.
            vars(optimizer)["found_inf"] = self.finite_check.judge(numbers)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set learning rates and weight decay, step, then `after_step`."""
        assert self.schedule is not None
        step = self.global_step
        optim.set_values(optimizer, self.schedule.at(step))
        check = self.finite_check
        before = BufferGuard(self.network)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.network.zero_grad()  # frees gradients before the next step's activations
        self.after_step(step, None if check is None else check.skip)
        if check is not None:
            before.restore_if(check.skip)

    @property
    def finished_epochs(self) -> int:
        """Epochs whose every step is done; Lightning counts one only after its checkpoint."""
        if self.schedule is None:  # before `plan_schedule`
            return self.current_epoch
        return self.global_step // self.schedule.steps_per_epoch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the weights in plain data for other programs."""
        checkpoint["msn"] = {
            "format": CHECKPOINT_FORMAT,
            "epoch": self.finished_epochs,
            **self.description,
            **self.settings,
            **self.checkpoint_info,
        }

    @property
    def description(self) -> dict[str, Any]:
        """The header of a weights file besides settings."""
        return {"kind": self.name}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the licence of the run's first weights."""
        if licence := checkpoint.get("msn", {}).get("licence"):
            self.checkpoint_info["licence"] = licence


def check_patch_size(views: ViewSettings, patch_size: int) -> None:
    """Raise a UserError if views are made for another patch size than the model's."""
    if views.patch_size != patch_size:
        raise UserError(
            f"data.views.patch_size={views.patch_size}: must be model.patch_size={patch_size}"
        )
