"""`python train.py`: compose -> build -> fit -> result."""

import logging
import warnings
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from msn.commands.entry import build, to_plain
from msn.commands.result import finish
from msn.commands.run_directory import RunDirectory, choose_run_directory
from msn.data.datamodule import MSNDataModule
from msn.errors import UserError
from msn.evaluation.protocol import Protocol
from msn.training.checkpointing import step_of
from msn.training.metrics import MetricsCSV
from msn.training.module import MSNModule
from msn.training.progress import build_progress
from msn.weights import initialise, read_weights


def run(config: DictConfig) -> None:
    """Pretrain, export the backbone, print the low-shot table.

    Everything that can be wrong is found before the run directory is made.

    Raises:
        UserError: if a setting, a path or a file is wrong.
    """
    settings = to_plain(config)
    _quieten()
    seed_everything(_seed(settings["seed"]), verbose=False)
    directory = choose_run_directory(config)
    data: MSNDataModule = build(config, "data")
    module: MSNModule = build(config, "module")
    if settings["init"] is not None and directory.resume_from is None:
        _initialise(module, str(settings["init"]), settings["model"]["num_heads"])
    protocol: Protocol = build(config, "protocol")
    labelled = data.labelled_sets()
    if labelled is not None:
        protocol.check(labelled[0].labels, labelled[0].classes)
    trainer = _build_trainer(config, directory, data, module)
    if trainer.is_global_zero:
        directory.create(config)
    data.run_dir = directory.path
    module.checkpoint_info.update(data=_describe_data(settings), init=settings["init"])
    _describe_run(trainer, directory, data, module)
    trainer.fit(module, datamodule=data, ckpt_path=directory.resume_from)
    if trainer.interrupted:
        return
    if trainer.is_global_zero:
        finish(settings, directory, data, module, protocol)
    trainer.strategy.barrier()


def _build_trainer(
    config: DictConfig, directory: RunDirectory, data: MSNDataModule, module: MSNModule
) -> Trainer:
    metrics = MetricsCSV(path=directory.path / "metrics.csv")
    if directory.resume_from is not None:
        metrics.resume_at(step_of(directory.resume_from))
    loggers = [
        metrics,
        *(build(config, f"logger.{name}", save_dir=str(directory.path)) for name in config.logger),
    ]
    runtime: dict[str, dict[str, Any]] = {"checkpoint": {"directory": directory.checkpoints}}
    callbacks = [
        build(config, f"callbacks.{name}", **runtime.get(str(name), {}))
        for name in config.callbacks
    ]
    trainer: Trainer = build(
        config,
        "trainer",
        callbacks=[*callbacks, build_progress()],
        loggers=loggers,
        run_dir=directory.path,
    )
    order = data.sampler(rank=trainer.global_rank, world_size=trainer.world_size)
    steps = len(order)
    if isinstance(config.trainer.limit_train_batches, int):
        steps = min(steps, config.trainer.limit_train_batches)
    module.plan_schedule(epochs=config.trainer.max_epochs, steps_per_epoch=steps)
    return trainer


def _initialise(module: MSNModule, path: str, num_heads: int) -> None:
    """Start from the weights of a file and say part by part what was taken."""
    weights = read_weights(path, num_heads=num_heads)
    rows = initialise(module.network, weights)
    # What descends from the published files stays under their licence.
    module.checkpoint_info["licence"] = weights.meta.get("licence")
    width = max(len(part) for part, _ in rows)
    print(f"starting from {path}:")
    for part, what in rows:
        print(f"  {part.ljust(width)}  {what}")


def _describe_data(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings["data"][key] for key in ("source", "root")}


def _describe_run(
    trainer: Trainer, directory: RunDirectory, data: MSNDataModule, module: MSNModule
) -> None:
    if not trainer.is_global_zero:
        return
    parameters = sum(p.numel() for p in module.network.anchor.trunk.parameters())
    views = data.settings
    print(
        f"training on {len(data.pools.train)} images, batch {data.global_batch_size}, "
        f"{trainer.max_epochs} epochs; backbone of {parameters / 1e6:.1f} M parameters; "
        f"1 + {views.rand_views} views of {views.rand_size} px and "
        f"{views.focal_views} of {views.focal_size} px"
    )
    if directory.resume_from is not None:
        print(f"resuming from {directory.resume_from}")


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number in [0, 2^32), got {seed!r}")
    return seed


def _quieten() -> None:
    """Leave out what Lightning says about itself and choices that are ours."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)
