"""`python eval_lowshot.py checkpoint=...`: measure backbones with few labels, beside baselines."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from msn.commands.entry import build, find_target, to_plain
from msn.commands.run_directory import choose_run_directory, forget_directory
from msn.commands.suite import TABLE_FILE, Suite, measure_suite, read_suite
from msn.data.datamodule import MSNDataModule, resolve_workers
from msn.data.dataset import LabelledImages
from msn.data.pools import PoolSettings, build_pools
from msn.data.sources import ArraySource
from msn.data.tables import cache_folder
from msn.errors import UserError
from msn.evaluation.backbones import (
    LARGEST_SIDE,
    FrozenBackbone,
    RawPixels,
    Subject,
    open_backbones,
    random_backbone,
)
from msn.evaluation.features import weights_key
from msn.evaluation.lowshot import Protocol, evaluate
from msn.evaluation.sets import Result
from msn.evaluation.table import print_table, write_results
from msn.images.depth import trained_depth
from msn.schema import make
from msn.training.launch import ignore_left_overs, join_launched_processes, meeting
from msn.weights.weights import BASELINES, MAJORITY, PIXELS, RANDOM


def run(config: DictConfig) -> Path | None:
    """Evaluate one or several backbones on the same label sets, beside baselines.

    Under torchrun or srun, all processes share the extraction of features and the first one writes.

    Returns:
        The run directory, in the first process.

    Raises:
        UserError: if a setting, a path or a file is wrong, or the data have no labels.
    """
    try:
        return _run(config)
    finally:
        forget_directory()


def _run(config: DictConfig) -> Path | None:
    config = without_views(config)
    settings = to_plain(config)
    protocol: Protocol = build(config, "protocol", Protocol)
    _check(settings)
    check_seed(settings["seed"])
    wanted = check_baselines(settings["baselines"], protocol)
    sets = None
    if settings["suite"] is not None:
        sets = read_suite(str(settings["suite"]), settings["data"])
        config.resume.mode = "auto"
    with _processes() as (rank, processes), ExitStack() as stack:
        directory, log = None, None
        if rank == 0:
            directory = choose_run_directory(config).reserve()
            stack.enter_context(directory.given_back_on_failure())
        opened = open_backbones(
            settings["checkpoint"],
            image_size=protocol.features.image_size,
            num_heads=settings["model"]["num_heads"],
            key=settings["init_key"],
            family=settings["init_family"],
        )
        for backbone in opened:
            protocol.check_backbone(backbone)
        subjects = [*opened, *baselines(wanted, opened[0], settings["seed"])]
        devices = choose_devices(settings["device"], processes)
        job = _Job(config, settings, subjects, devices, MAJORITY in wanted)
        if sets is None:
            pools = job.pools(settings["data"], protocol)
            if directory is not None and settings.get("logger"):
                log = _open_log(config, directory.path, settings, stack)
            results = job.evaluate(protocol, pools, shared=processes > 1)
        else:
            if directory is not None:
                directory.create(OmegaConf.create(settings))
            stack.close()  # from here on, a failure keeps what is done
            place = None if directory is None else directory.path
            measure_suite(job.suite(sets), place, shared=processes > 1)
    if directory is None:
        return None
    if sets is None:
        directory.create(OmegaConf.create(settings))
        write_table(directory.path, results, pools, settings)
    directory.write_status("finished")
    if log is not None:
        log.log_results()
    print(f"run directory: {directory.path}")
    return directory.path


class _Job(NamedTuple):
    """Backbones, and how they are measured on any data set."""

    config: DictConfig
    settings: dict[str, Any]
    subjects: list[Subject]
    devices: tuple[torch.device, ...]
    majority: bool

    def pools(
        self, data: dict[str, Any], protocol: Protocol
    ) -> tuple[LabelledImages, LabelledImages]:
        """Labelled and held-out images, checked for the protocol."""
        abouts = [one.about for one in self._networks() if not one.is_baseline]
        data["depth"] = trained_depth(data["depth"], abouts)
        train, held_out = _labelled_sets(data)
        protocol.check(train.labels, train.classes)
        return train, held_out

    def evaluate(
        self, protocol: Protocol, pools: tuple[LabelledImages, LabelledImages], *, shared: bool
    ) -> list[Result]:
        """Rows of all backbones."""
        in_memory = isinstance(pools[0].images.source, ArraySource)
        workers = self.settings["data"]["num_workers"]
        return evaluate(
            protocol,
            self.subjects,
            *pools,
            num_workers=resolve_workers(workers, in_memory=in_memory),
            device=self.devices,
            cache_dir=cache_directory(self.settings["cache_dir"]),
            shared=shared,
            majority=self.majority,
        )

    def suite(self, sets: Mapping[str, dict[str, Any]]) -> Suite:
        """The suite, which measures each data set with its own instance of the protocol."""

        def measure(data: dict[str, Any], *, shared: bool) -> tuple[list[Result], LabelledImages]:
            protocol: Protocol = build(self.config, "protocol", Protocol)
            pools = self.pools(data, protocol)
            return self.evaluate(protocol, pools, shared=shared), pools[1]

        weights = {one.name: weights_key(one.trunk) for one in self._networks()}
        return Suite(sets, measure, weights, self.settings)

    def _networks(self) -> list[FrozenBackbone]:
        return [one for one in self.subjects if isinstance(one, FrozenBackbone)]


def _open_log(config: DictConfig, place: Path, settings: dict[str, Any], stack: ExitStack) -> Any:
    """Open the run at wandb, before the work, so that mistakes show early."""
    log = build(config, "logger.wandb", save_dir=str(place), job_type="eval_lowshot")
    stack.push(log.close_after_error)
    log.log_hyperparams(settings)
    return log


def write_table(
    directory: Path,
    results: Sequence[Result],
    pools: tuple[LabelledImages, LabelledImages],
    settings: dict[str, Any],
) -> None:
    """Write the table, with curves and heads, to the run directory, and print it.

    Raises:
        UserError: if it cannot be written.
    """
    train, held_out = pools
    write_results(directory / TABLE_FILE, results, settings, held_out)
    print_table(results, f"labels from {len(train)} images, {len(held_out)} held out")


def check_baselines(setting: Any, protocol: Protocol) -> list[str]:
    """Names of the baselines, as given or, for `auto`, those of the protocol.

    Raises:
        UserError: if a baseline does not exist.
    """
    if setting == "auto":
        return list(protocol.baselines)
    wanted = [setting] if isinstance(setting, str) else setting or []
    if not isinstance(wanted, list) or not all(name in BASELINES for name in wanted):
        allowed = ", ".join(BASELINES)
        raise UserError(f"baselines must be a list of {allowed}, or auto, got {setting}")
    return wanted


def check_seed(seed: Any) -> int:
    """The `seed` of a command.

    Raises:
        UserError: if it is not a whole number in [0, 2^32).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number in [0, 2^32), got {seed!r}")
    return seed


def baselines(wanted: list[str], like: FrozenBackbone, seed: int) -> list[Subject]:
    """The wanted ones of a random network of the same architecture and raw pixels."""
    found: list[Subject] = []
    if RANDOM in wanted:
        found.append(random_backbone(like, seed=seed))
    if PIXELS in wanted:
        found.append(RawPixels(PIXELS, min(like.image_size, LARGEST_SIDE)))
    return found


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` takes an accelerator if there is one.

    Raises:
        UserError: if it is not available.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        torch.empty(0, device=str(name))
        device = torch.device(str(name))
    except (RuntimeError, AssertionError):
        device = torch.device("meta")
    if device.type == "meta":  # it holds no numbers
        raise UserError(f"device={name} is not available on this machine")
    return device  # cuda without a number means all


def choose_devices(name: str, processes: int) -> tuple[torch.device, ...]:
    """Devices of this process: all GPUs, or its own if there are several processes."""
    device = choose_device(name)
    if device.type != "cuda" or device.index is not None:
        return (device,)
    if processes > 1:
        return (torch.device("cuda", torch.cuda.current_device()),)
    return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count()))


def cache_directory(setting: str | None) -> Path | None:
    """Directory for features: `auto` is msn/features in the user's cache; None keeps none."""
    if setting is None:
        return None
    if setting != "auto":
        return Path(setting)
    return cache_folder() / "features"


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Within, the processes that a launcher started are one group: rank and number of processes."""
    ignore_left_overs(os.environ)
    join_launched_processes(os.environ)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    backend = "gloo"  # rows travel through host memory
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # gradients do not travel through host memory
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with meeting(_leave):
        dist.init_process_group(backend)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _leave(number: int) -> None:
    """End the process while it waits for others."""
    print(f"interrupted by {signal.Signals(number).name}: nothing was started", file=sys.stderr)
    sys.stderr.flush()
    os._exit(128 + number)


def without_views(config: DictConfig) -> DictConfig:
    """The configuration without the settings of `data` that only pretraining needs.

    Raises:
        UserError: see `refuse_other_target`.
    """
    refuse_other_target(config)
    unused = ("views", "seed")
    reduced = OmegaConf.masked_copy(config, [str(key) for key in config if key != "data"])
    used = [str(key) for key in config.data if key not in unused]
    data = OmegaConf.masked_copy(config.data, used)
    merged = OmegaConf.merge(reduced, {"data": data})
    assert isinstance(merged, DictConfig)
    return merged


def refuse_other_target(config: DictConfig) -> None:
    """Refuse a `data._target_` other than our data module, which only training would build.

    Raises:
        UserError: if it names another one.
    """
    if find_target(config, "data", MSNDataModule) is not MSNDataModule:
        name = config.data._target_
        raise UserError(f"data._target_={name}: only training can use another one; leave it out")


def _labelled_sets(data: dict[str, Any]) -> tuple[LabelledImages, LabelledImages]:
    pools = build_pools(make("data", data, PoolSettings))
    if pools.labelled is None or pools.held_out is None:
        where = data["root"] or data["source"]
        raise UserError(f"{where} has no labels, which low-shot evaluation needs: {pools.why}")
    strict = data["strict"]
    return (
        LabelledImages(pools.labelled, "training", strict=strict),
        LabelledImages(pools.held_out, "held-out", strict=strict),
    )


def _check(settings: dict[str, Any]) -> None:
    for name in settings.get("logger") or {}:
        if name != "wandb":
            raise UserError(f"logger must be wandb or none for an evaluation, got {name}")
    if settings.get("logger") and settings["suite"] is not None:
        raise UserError("logger=wandb: not with a suite; evaluate each data set by itself")
