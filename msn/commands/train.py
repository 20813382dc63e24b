"""`python train.py`: compose -> build -> fit -> result."""

import contextlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from msn.commands import plan
from msn.commands.adaptation import choose_prototypes, follow_init, foundation_weights
from msn.commands.entry import build, one_line, to_plain
from msn.commands.eval_lowshot import check_baselines, check_seed
from msn.commands.result import evaluated, finish
from msn.commands.run_directory import (
    RunDirectory,
    choose_run_directory,
    forget_directory,
    is_inherited,
    read_status,
)
from msn.data.datamodule import MSNDataModule
from msn.data.workers import in_one_line
from msn.errors import UserError
from msn.evaluation.lowshot import Protocol
from msn.evaluation.table import versions
from msn.images.depth import RECORDED
from msn.method.distributed import process_index
from msn.schema import as_argument, check_switch
from msn.training.base import PretrainingModule
from msn.training.checkpointing import check_same_run, identity_of, step_of
from msn.training.launch import (
    agree,
    end_started_processes,
    fit_devices,
    ignore_left_overs,
    read_launch,
    starts_processes,
)
from msn.training.loggers import MetricsCSV, WandbRun
from msn.training.preemption import EXIT_CODE, Preempted, Preemption, requeue_slurm_job
from msn.training.progress import build_progress
from msn.weights import initialise
from msn.weights.reading import newest_valid_checkpoint


def run(config: DictConfig) -> Path | None:
    """Pretrain, export the backbone, print the low-shot table.

    Mistakes are found before the run directory is made. A run that a signal interrupts is saved
    and ends the process with `preemption.EXIT_CODE`.

    Returns:
        The run directory; None for a plan.

    Raises:
        UserError: if a setting, a path or a file is wrong.
    """
    said = follow_init(config)
    settings = to_plain(config)
    _quieten()
    seed_everything(check_seed(settings["seed"]), verbose=False)
    if not is_inherited():
        ignore_left_overs(os.environ)
    for name in ("report", "keep_better", "plan"):
        check_switch(name, settings[name])
    check_switch("resume.force", settings["resume"]["force"])
    if settings["plan"]:
        if settings["method"].get("num_prototypes", 0) is None:
            said += choose_prototypes(config, plan.count_images(config, settings, all_=True))
        print(*said, sep="\n", end="\n" if said else "")
        plan.run(config, to_plain(config), Console())
        return None
    preemption: Preemption = build(config, "callbacks.preemption", Preemption)
    preemption.install()
    try:
        return _run(config, said, preemption)
    except Preempted as stop:
        return _leave(stop)
    finally:
        preemption.uninstall()
        forget_directory()


def _run(config: DictConfig, said: list[str], preemption: Preemption) -> Path:
    data: MSNDataModule = build(config, "data", MSNDataModule)
    said += choose_prototypes(config, len(data.pools.train))
    settings = to_plain(config)
    plan.refuse_beyond_reason(config, settings)
    module: PretrainingModule = build(config, "module", PretrainingModule)
    protocol: Protocol = build(config, "protocol", Protocol)
    check_baselines(settings["baselines"], protocol)
    evaluated(module, protocol)
    labelled = data.labelled_sets()
    if labelled is not None:
        protocol.check(labelled[0].labels, labelled[0].classes)
    trainer = _build_trainer(config, data, module)

    def choose() -> RunDirectory:
        chosen = choose_run_directory(config).reserve()
        chosen.hand_down()
        return chosen

    def leave(number: int) -> None:
        try:
            _leave(preemption.asked_by(number))
        except SystemExit as end:
            os._exit(int(end.code or 0))  # as torch waits, in the main thread

    directory = choose() if is_inherited() else agree(trainer, module, choose, leave)
    with closed_loggers(trainer):
        with directory.given_back_on_failure():
            _set_up(config, directory, trainer, data, module, preemption=preemption)
        _describe_run(trainer, directory, data, module, said)
        trained = None
        try:
            _fit(settings, trainer, module, data, directory)
            trained = directory.path
            preemption.check()
            module.make_whole()
            finish(settings, directory, trainer, data, module, protocol)
            trainer.strategy.barrier()
        except BaseException as error:
            if not isinstance(error, Preempted):
                end_started_processes(trainer)
            elif error.checkpoint is None:  # else all processes have stopped as one
                error.trained = trained
                end_started_processes(trainer)
            raise
    return directory.path


def _set_up(
    config: DictConfig,
    directory: RunDirectory,
    trainer: Trainer,
    data: MSNDataModule,
    module: PretrainingModule,
    *,
    preemption: Preemption,
) -> None:
    """Do everything that needs the directory and can fail, then write its first files."""
    settings = to_plain(config)
    module.checkpoint_info.update(
        data=_describe_data(settings), init=settings["init"], identity=identity_of(settings)
    )
    module.checkpoint_info[RECORDED] = data.depth
    data.run_dir, data.force_resume = directory.path, settings["resume"]["force"]
    if directory.resume_from is not None:
        check_same_run(
            directory.resume_from,
            module.checkpoint_info["identity"],
            module.state_dict(),
            force=data.force_resume,
        )
    elif settings["init"] is not None:
        _initialise(module, settings)
    _attach(config, trainer, directory, preemption)
    if data.depth is not None:  # the run keeps the depth that was found
        config.data.depth = data.depth
    if trainer.is_global_zero:
        directory.begin_again()
        directory.create(config)
    for logger in trainer.loggers:
        _begin(logger, settings)
    if trainer.is_global_zero:
        directory.write_status("unfinished", facts=_facts(trainer, data, module))


def _fit(
    settings: dict[str, Any],
    trainer: Trainer,
    module: PretrainingModule,
    data: MSNDataModule,
    directory: RunDirectory,
) -> None:
    """Train; an error of the machine ends the run in one line that says how to continue."""

    def how_to_continue() -> str:
        how = "continues from its last checkpoint"
        if newest_valid_checkpoint(directory.checkpoints) is None:
            how = "starts again: nothing is saved yet"
        return f"; the same command with {as_argument('run.dir', directory.path)} {how}"

    with in_one_line(
        lambda: plan.less_memory(
            settings, module, trainer.strategy.root_device, trainer.world_size
        ),
        how_to_continue,
    ):
        trainer.fit(module, datamodule=data, ckpt_path=directory.resume_from)


def _build_trainer(config: DictConfig, data: MSNDataModule, module: PretrainingModule) -> Trainer:
    """The trainer, without the callbacks and loggers that need the run directory."""
    launch = read_launch(os.environ)
    devices, num_nodes = fit_devices(
        launch, to_plain(config, "trainer")["devices"], config.trainer.num_nodes
    )
    config = OmegaConf.masked_copy(config, [str(key) for key in config])
    config.trainer.devices, config.trainer.num_nodes = devices, num_nodes
    trainer: Trainer = build(
        config,
        "trainer",
        Trainer,
        callbacks=[build_progress()],
        loggers=[],
        run_dir=config.run.root,
    )
    if starts_processes(trainer) and _is_multirun():
        raise UserError(
            "--multirun cannot start the several processes that each of its runs needs: use "
            "hydra/launcher=slurm, or torchrun without --multirun, or trainer.devices=1"
        )
    order = data.sampler(rank=trainer.global_rank, world_size=trainer.world_size)
    steps = len(order)
    if config.trainer.limit_train_batches is not None:
        steps = min(steps, config.trainer.limit_train_batches)
    steps = -(-steps // config.trainer.accumulate_grad_batches)
    module.plan_schedule(epochs=config.trainer.max_epochs, steps_per_epoch=steps)
    return trainer


def _attach(
    config: DictConfig, trainer: Trainer, directory: RunDirectory, preemption: Preemption
) -> None:
    """Give the trainer its callbacks and loggers, which write to the run directory."""
    runtime: dict[str, dict[str, Any]] = {
        "checkpoint": {"directory": directory.checkpoints},
        "verdict": {"directory": directory.path},
        "guard": {"directory": directory.path},
    }
    callbacks = [
        preemption
        if name == "preemption"
        else build(config, f"callbacks.{name}", **runtime.get(str(name), {}))
        for name in config.callbacks
    ]
    trainer.loggers = _build_loggers(config, directory)
    # Checkpoints come last, as in Lightning, so that they hold what the others have done.
    callbacks.sort(key=lambda callback: isinstance(callback, Checkpoint))
    own: list[Callback] = vars(trainer)["callbacks"]  # Lightning does not declare it
    own[:0] = callbacks
    own.sort(key=lambda callback: isinstance(callback, Checkpoint))


def _leave(stop: Preempted) -> NoReturn:
    """Print what was saved and how to continue, requeue, and end with the documented code."""
    if is_inherited():
        sys.exit(0)  # the process that started this one reports, and expects a 0
    path = stop.trained
    is_finished = path is not None and read_status(path).get("status") == "finished"
    if stop.checkpoint is not None:
        path = stop.checkpoint.parent.parent
        said = f"saved {stop.checkpoint}; the same command with its run.name or run.dir continues"
    elif path is None:
        said = "before the first step; the same command starts as this one did"
    elif is_finished:
        report = f"python -m msn report {as_argument('runs', path)}"
        said = f"the run is finished, without its report: {report}"
    else:
        said = (
            "after the last step, which is saved; the same command with its run.name or run.dir "
            f"makes the table, or python eval_lowshot.py {as_argument('checkpoint', path)}"
        )
    if process_index() == 0:
        print(f"interrupted: {said}", flush=True)
        if path is not None:
            print(f"run directory: {path}", flush=True)
        if stop.requeue and not is_finished and (requeued := requeue_slurm_job()) is not None:
            print(requeued, flush=True)
    code = 0 if is_finished else EXIT_CODE
    if "SUBMITIT_EXECUTOR" in os.environ:
        os._exit(code)  # else submitit keeps the exit as this run's result and asks no more
    sys.exit(code)


def _is_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _initialise(module: PretrainingModule, settings: dict[str, Any]) -> None:
    """Start from the weights of a file and print what happens to each part."""
    path, weights = str(settings["init"]), foundation_weights(settings)
    try:
        rows = initialise(module.network, weights)
    except UserError as error:
        raise UserError(f"init={path}: {error}") from None
    # Weights that descend from published files keep their licence.
    module.checkpoint_info["licence"] = weights.meta.get("licence")
    width = max(len(part) for part, _ in rows)
    print(f"starting from {path}:")
    for part, what in rows:
        print(f"  {part.ljust(width)}  {what}")


def _describe_data(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings["data"][key] for key in ("source", "root")}


def _describe_run(
    trainer: Trainer,
    directory: RunDirectory,
    data: MSNDataModule,
    module: PretrainingModule,
    said: list[str],
) -> None:
    if not trainer.is_global_zero:
        return
    for line in said:
        print(line)
    parameters = sum(p.numel() for p in module.network.backbone.parameters())
    views = data.views
    seen = f"1 + {views.rand_views} views of {views.rand_size} px and "
    seen += f"{views.focal_views} of {views.focal_side} px"
    if views.num_views == 1:
        seen = f"1 view of {views.rand_size} px"
    print(
        f"training on {len(data.pools.train)} images, batch {data.global_batch_size}, "
        f"{trainer.max_epochs} epochs; backbone of {parameters / 1e6:.1f} M parameters; {seen}"
    )
    if data.pools.held_out is None:
        print(f"no labels, so no low-shot table at the end: {data.pools.why}")
    if directory.resume_from is not None:
        print(f"resuming from {directory.resume_from}")


def _quieten() -> None:
    """Silence what Lightning says about itself and about our own choices."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*exists and is not empty.*",
        ".*smaller than the logging interval.*",  # monitors log a short epoch's last step
        ".*your dataloader is not resumable.*",  # the data module holds the position
    ):
        warnings.filterwarnings("ignore", message)


def _facts(trainer: Trainer, data: MSNDataModule, module: PretrainingModule) -> dict[str, Any]:
    """Machine, sizes and versions, for the report."""
    assert module.schedule is not None
    return {
        "device": _device_name(trainer.strategy.root_device),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "training_images": len(data.pools.train),
        "steps_per_epoch": module.schedule.steps_per_epoch,
        "parameters": sum(p.numel() for p in module.network.backbone.parameters()),
        "versions": versions(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{device.type.upper()}, {name}, {torch.get_num_threads()} threads"


def _build_loggers(config: DictConfig, directory: RunDirectory) -> list[Logger]:
    """The loggers, which write to the run directory.

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


def _begin(logger: Logger, settings: dict[str, Any]) -> None:
    """Pass the settings to a logger: wandb and MLflow start here, or fail."""
    try:
        logger.log_hyperparams(settings)
    except Exception as error:  # login, network or server: loggers have many classes of errors
        if type(logger).__module__.startswith("msn."):
            raise
        raise UserError(f"{type(logger).__name__}: {one_line(error)}") from None


@contextlib.contextmanager
def closed_loggers(trainer: Trainer) -> Iterator[None]:
    """At the end, close the loggers, whatever happened, for the next run of a sweep."""
    failed = True
    try:
        yield
        failed = False
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.close(failed=failed)
