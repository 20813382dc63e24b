"""`python eval_lowshot.py checkpoint=...`: label few, measure honestly, for any backbone."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from msn.commands.entry import build, to_plain
from msn.commands.run_directory import choose_run_directory
from msn.data.datamodule import resolve_workers
from msn.data.dataset import LabelledImages
from msn.data.pools import build_pools
from msn.data.sources import ArraySource
from msn.errors import UserError
from msn.evaluation.lowshot import PIXELS, KShot, evaluate
from msn.evaluation.results import print_table, write_results
from msn.method.vit import VisionTransformer
from msn.schema import take
from msn.weights import build_trunk, read_weights

BASELINES = ("random", PIXELS)


def run(config: DictConfig) -> None:
    """Evaluate one backbone or several on the same splits, beside the baselines.

    Raises:
        UserError: if a setting, a path or a file is wrong, or the data have no labels.
    """
    config = _without_views(config)
    settings = to_plain(config)
    protocol: KShot = build(config, "protocol")
    _check_baselines(settings["baselines"])
    directory = choose_run_directory(config)
    backbones: dict[str, VisionTransformer | str] = {
        name: build_trunk(read_weights(path, num_heads=settings["model"]["num_heads"]))
        for name, path in named_checkpoints(settings["checkpoint"]).items()
    }
    first = next(iter(backbones.values()))
    assert isinstance(first, VisionTransformer)
    train, held_out = _labelled_sets(settings["data"])
    protocol.check(train.labels, train.classes)
    backbones |= baselines(settings["baselines"], first, settings["seed"])
    rows = evaluate(
        protocol,
        backbones,
        train,
        held_out,
        image_size=first.img_size,
        num_workers=resolve_workers(
            settings["data"]["num_workers"], in_memory=isinstance(train.images.source, ArraySource)
        ),
        device=choose_device(settings["device"]),
    )
    directory.create(OmegaConf.create(settings))
    print_table(rows, table_title(protocol, len(train), len(held_out)))
    write_results(directory.path / "lowshot.json", rows, settings)
    directory.write_status("finished")
    print(f"run directory: {directory.path}")


def named_checkpoints(checkpoint: Any) -> dict[str, str]:
    """Names and paths of `checkpoint=PATH` (named msn) or `checkpoint=[name:path,name:path]`.

    Raises:
        UserError: if a name is missing, doubled or that of a baseline.
    """
    if isinstance(checkpoint, str):
        return {"msn": checkpoint}
    named: dict[str, str] = {}
    for entry in checkpoint if isinstance(checkpoint, list) else [None]:
        name, colon, path = str(entry).partition(":")
        if not colon or not name or not path:
            raise UserError(f"checkpoint must be a path or [name:path,name:path], got {checkpoint}")
        if name in named or name in BASELINES:
            raise UserError(f"checkpoint name {name} is taken: choose another")
        named[name] = path
    if not named:
        raise UserError("checkpoint=[] names no backbone")
    return named


def baselines(
    wanted: list[str], like: VisionTransformer, seed: int
) -> dict[str, VisionTransformer | str]:
    """A random network of the same shape and raw pixels, as far as wanted."""
    found: dict[str, VisionTransformer | str] = {}
    if "random" in wanted:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found["random"] = VisionTransformer(**like.model_config)  # type: ignore[arg-type]
    if PIXELS in wanted:
        found[PIXELS] = PIXELS
    return found


def table_title(protocol: KShot, num_train: int, num_held_out: int) -> str:
    """What the table shows, in words."""
    return (
        f"top-1 %, mean +- std of {protocol.splits} splits; labels from {num_train} images, "
        f"{num_held_out} held out"
    )


def choose_device(name: str) -> torch.device:
    """The device of that name; auto takes an accelerator where there is one.

    Raises:
        UserError: if there is no such device.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"device={name} is not to be had on this machine") from None


def _without_views(config: DictConfig) -> DictConfig:
    """The configuration without what only pretraining needs of the data."""
    unused = ("views", "seed")
    reduced = OmegaConf.masked_copy(config, [str(key) for key in config if key != "data"])
    used = [str(key) for key in config.data if key not in unused]
    data = OmegaConf.masked_copy(config.data, used)
    return OmegaConf.merge(reduced, {"data": data})  # type: ignore[return-value]


def _labelled_sets(data: dict[str, Any]) -> tuple[LabelledImages, LabelledImages]:
    pools = build_pools(**take("data", data, build_pools))
    if pools.labelled is None or pools.held_out is None:
        where = data["root"] or data["source"]
        raise UserError(
            f"{Path(str(where))} has no labels: low-shot evaluation needs class folders"
        )
    return (
        LabelledImages(pools.labelled, "training"),
        LabelledImages(pools.held_out, "held-out"),
    )


def _check_baselines(wanted: list[str]) -> None:
    for name in wanted:
        if name not in BASELINES:
            raise UserError(f"baselines must be among {', '.join(BASELINES)}, got {name}")
