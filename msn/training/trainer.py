"""Lightning's Trainer with the settings of pretraining."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from msn.data.datamodule import MSNDataModule
from msn.errors import UserError
from msn.training.checkpointing import DurableCheckpointIO
from msn.training.launch import cluster_environment
from msn.training.strategy import DDP_OPTIONS, ShardedStrategy

T = TypeVar("T")

# Not 16-mixed: gradients would be clipped while scaled, and the target would move after skipped
# steps. Not bf16-true: the target's small updates would round away.
PRECISIONS = ("auto", "32-true", "bf16-mixed", "64-true")

# Not settings: each of these is done elsewhere, or would do harm.
_FIXED: dict[str, Any] = {
    "use_distributed_sampler": False,  # the data module owns the order of images
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "gradient_clip_val": None,  # the module clips the encoder alone
}


def build_trainer(
    *,
    max_epochs: int,
    accelerator: str,
    devices: int | str | list[int],
    num_nodes: int,
    strategy: str,
    precision: str,
    deterministic: bool,
    log_every_n_steps: int,
    limit_train_batches: int | None,
    accumulate_grad_batches: int,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    run_dir: str | Path,
) -> Trainer:
    """Build the trainer of a pretraining run.

    Args:
        max_epochs: >= 1.
        accelerator: as in Lightning: auto, cpu, gpu, mps, ...
        devices: number or list of devices of this node, or "auto" for all.
        num_nodes: >= 1.
        strategy: as in Lightning: auto, ddp, ...; fsdp2 cuts the network over the processes.
        precision: "auto" is bf16-mixed on CUDA and 32-true elsewhere.
        deterministic: use deterministic kernels alone, for bit-equal reruns on CUDA.
        log_every_n_steps: >= 1.
        limit_train_batches: steps per epoch, for a trial, >= 1; None takes all.
        accumulate_grad_batches: batches per optimiser step, >= 1; the method may refuse others.
        callbacks: of the run.
        loggers: of the run.
        run_dir: where everything of the run goes.

    Raises:
        UserError: if a value is out of its range.
    """
    _check_at_least_one(
        max_epochs=max_epochs,
        num_nodes=num_nodes,
        log_every_n_steps=log_every_n_steps,
        limit_train_batches=limit_train_batches,
        accumulate_grad_batches=accumulate_grad_batches,
    )
    return _trainer(
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=ShardedStrategy() if strategy == "fsdp2" else strategy,
        precision=resolve_precision(precision, accelerator),
        deterministic=deterministic,
        log_every_n_steps=log_every_n_steps,
        limit_train_batches=limit_train_batches,
        accumulate_grad_batches=accumulate_grad_batches,
        callbacks=list(callbacks),
        logger=list(loggers),
        default_root_dir=str(run_dir),
    )


def _trainer(*, callbacks: list[Callback], **arguments: Any) -> Trainer:
    try:
        trainer = Trainer(
            callbacks=callbacks,
            plugins=[DurableCheckpointIO(), cluster_environment(os.environ)],
            # Otherwise Lightning adds its own.
            enable_checkpointing=any(isinstance(part, Checkpoint) for part in callbacks),
            enable_progress_bar=any(isinstance(part, ProgressBar) for part in callbacks),
            **arguments,
            **_FIXED,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"trainer: {error}") from None
    if isinstance(trainer.strategy, DDPStrategy):  # set or chosen by Lightning
        vars(trainer.strategy)["_ddp_kwargs"] |= DDP_OPTIONS
    # Crop boxes must not be rounded to the network's type; views are made in that type.
    override(trainer.precision_plugin, "convert_input", lambda data: data)
    return trainer


def override(owner: object, method: str, by: Callable[..., Any]) -> None:
    """Replace a method of one object; the method must exist."""
    assert callable(getattr(owner, method))
    setattr(owner, method, by)


def callbacks_of(trainer: Trainer, kind: type[T]) -> list[T]:
    """The trainer's callbacks of a kind; Lightning declares no type for what it holds."""
    return [part for part in vars(trainer)["callbacks"] if isinstance(part, kind)]


def data_of(trainer: Trainer) -> MSNDataModule:
    """The data module that the trainer fits on."""
    data = vars(trainer)["datamodule"]
    assert isinstance(data, MSNDataModule)
    return data


def _check_at_least_one(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"trainer.{name} must be >= 1, got {value}")


def resolve_precision(precision: str, accelerator: str) -> str:
    """Resolve "auto": bf16-mixed on CUDA, 32-true elsewhere.

    CUDA devices below compute capability 8.0 (T4, RTX 20) have no bf16 units and take 32-true.

    Raises:
        UserError: if it is not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise UserError(f"trainer.precision must be in {', '.join(PRECISIONS)}, got {precision}")
    if precision != "auto":
        return precision
    on_cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    half = on_cuda and torch.cuda.get_device_capability() >= (8, 0)
    return "bf16-mixed" if half else "32-true"
