"""The loggers of a run: metrics.csv always, others optionally."""

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from msn.commands.entry import build
from msn.commands.run_directory import RunDirectory
from msn.training.checkpointing import step_of
from msn.training.loggers import MetricsCSV, TensorBoardRun, WandbRun


def build_loggers(config: DictConfig, directory: RunDirectory) -> list[Logger]:
    """The loggers, which write into the run directory when it is there.

    Raises:
        UserError: if a setting of a logger is wrong.
    """
    metrics = MetricsCSV(path=directory.path / "metrics.csv")
    resume_step = None if directory.resume_from is None else step_of(directory.resume_from)
    if resume_step is not None:
        metrics.resume_at(resume_step)
    runtime: dict[str, dict[str, Any]] = {"tensorboard": {"resume_step": resume_step}}
    others = [
        build(config, f"logger.{name}", save_dir=str(directory.path), **runtime.get(str(name), {}))
        for name in config.logger
    ]
    return [metrics, *others]


@contextlib.contextmanager
def closed_loggers(trainer: Trainer) -> Iterator[None]:
    """Whatever happens within, no logger is left open for the next run of a sweep."""
    failed = True
    try:
        yield
        failed = False
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.close(failed=failed)


def log_results(trainer: Trainer) -> None:
    """Tables and artifacts of a finished run, to the loggers that take them."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbRun | TensorBoardRun):
            logger.log_results()
