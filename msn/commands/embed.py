"""`python -m msn embed checkpoint=PATH data.root=DIR out=FILE`: features per image, with ids.

Work is kept in pieces beside `out` until it is whole, so that a stopped job goes on where it was.
"""

import csv
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset

from msn.commands.entry import to_plain
from msn.commands.eval_lowshot import choose_device
from msn.data.datamodule import resolve_workers
from msn.data.dataset import Subset
from msn.data.sources import Source, find_depth, folder_source, list_source
from msn.data.workers import in_one_line, make_loader
from msn.errors import UserError
from msn.evaluation.features import (
    check_feature,
    digest_of,
    forward_feature,
    images_key,
    less_memory,
    weights_key,
)
from msn.files import write_bytes, writing_to
from msn.images.depth import RECORDED, check_depth, trained_depth
from msn.images.kinds import BadImageError
from msn.progress import Progress
from msn.weights import Backbone, load_backbone
from msn.weights.tensors import open_weights, save_tensors

log = logging.getLogger(__name__)

# Images of a piece: what a stopped job loses at most.
PIECE = 1024
# A safetensors header holds 100 MB; the ids stand in it.
MAX_ID_BYTES = 90_000_000
SUFFIX = ".safetensors"
SHOWN = 10


def run(config: DictConfig) -> None:
    """Write features [n, D] float32 and, in the header, the image names in the same order.

    Raises:
        UserError: if a setting, path or file is wrong, `out` exists, or no image can be read.
    """
    settings = to_plain(config)
    out = Path(str(settings["out"])).resolve()
    _check(settings, out)
    backbone = load_backbone(
        settings["checkpoint"],
        num_heads=settings["model"]["num_heads"],
        key=settings["init_key"],
    )
    check_feature(settings["feature"], backbone.depth)
    root = str(settings["data"]["root"])
    if os.path.isfile(root):
        source: Source = list_source(root, key="data.root", root=None, use_labels=False)
    else:
        source = folder_source(root, key="data.root", use_labels=False)
    depth = trained_depth(check_depth(settings["data"]["depth"]), [backbone.meta])
    source.depth = find_depth(source, depth)
    names = [source.name(i) for i in range(len(source))]
    if sum(len(json.dumps(name)) + 4 for name in names) > MAX_ID_BYTES:
        raise UserError(f"data.root={root}: too many images for one file; embed its folders apart")
    pieces = out.parent / f".{out.name}.{_digest(backbone, source, settings['feature'])}.part"
    try:
        with in_one_line(
            lambda: less_memory("batch_size", settings["batch_size"]),
            lambda: "; the same command goes on",
        ):
            _embed(backbone, _Images(source, backbone), settings, pieces)
        missing = _join(pieces, names, out, _header(backbone, source, settings))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: what is done stays in {pieces}; the same command goes on from it"
        ) from None
    shutil.rmtree(pieces, ignore_errors=True)
    for name, reason in missing[:SHOWN]:
        print(f"left out, cannot be read: {name} ({reason})")
    if missing:
        print(f"all that were left out: {_unreadable(out)}")
    print(f"{len(names) - len(missing)} images embedded, {len(missing)} left out: {out}")


class _Images(Dataset[tuple[Tensor, str]]):
    """Transformed images and an empty text; an unreadable one is zeros and why."""

    def __init__(self, source: Source, backbone: Backbone) -> None:
        self.source, self.transform, self.size = source, backbone.transform, backbone.img_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.transform(self.source.rgb(index)), ""
        except BadImageError as error:
            return torch.zeros(3, self.size, self.size), str(error) or "unreadable"


def _check(settings: dict[str, Any], out: Path) -> None:
    batch_size = settings["batch_size"]
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
    if out.is_dir():
        raise UserError(f"out={out} is a directory; it must be a file such as features.safetensors")
    if out.suffix != SUFFIX:
        raise UserError(f"out={out}: features are written as safetensors; the name must end so")
    if out.exists() and settings["overwrite"] is not True:
        raise UserError(f"out={out} exists; overwrite=true replaces it")


def _embed(backbone: Backbone, images: _Images, settings: dict[str, Any], pieces: Path) -> None:
    """Fill the directory of pieces; those that are there and whole are passed over."""
    device = choose_device(settings["device"])
    workers = resolve_workers(settings["data"]["num_workers"], in_memory=False)
    with writing_to(pieces):
        pieces.mkdir(parents=True, exist_ok=True)
    backbone.to(device)
    ranges = [range(at, min(at + PIECE, len(images))) for at in range(0, len(images), PIECE)]
    left = [indices for indices in ranges if not _is_whole(_piece(pieces, indices[0]), indices)]
    total = sum(len(indices) for indices in left)
    if total < len(images):
        print(f"resuming: {len(images) - total} of {len(images)} images are done")
    with Progress("embedding", total, show=True) as progress:
        for indices in left:
            rows, reasons = [], []
            size = settings["batch_size"]
            for batch, unread in make_loader(
                images, batch_size=size, sampler=indices, num_workers=workers
            ):
                features = forward_feature(
                    backbone, batch.to(device, backbone.cls_token.dtype), settings["feature"]
                )
                if not bool(features.isfinite().all()):
                    raise UserError(f"checkpoint={settings['checkpoint']}: makes NaN or infinity")
                rows.append(features.float().cpu())
                reasons += unread
                progress.advance(len(batch))
            readable = torch.tensor([not reason for reason in reasons])
            tensors = {"features": torch.cat(rows), "readable": readable}
            metadata = {**_digests(tensors), "reasons": json.dumps(reasons)}
            save_tensors(_piece(pieces, indices[0]), tensors, metadata)


def _is_whole(piece: Path, indices: range) -> bool:
    """Whether a piece is there as it was written; a damaged one is named and made again."""
    if not piece.exists():
        return False
    try:
        tensors, metadata = open_weights(piece)
        said = {name: metadata.get(name) for name in tensors}
        count = len(json.loads(metadata["reasons"]))
        whole = said == _digests(tensors) and count == len(tensors["readable"]) == len(indices)
    except (UserError, KeyError, ValueError):
        whole = False
    if not whole:
        log.warning("%s is damaged and made again", piece)
    return whole


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: digest_of(tensor) for name, tensor in tensors.items()}


def _join(
    pieces: Path, names: list[str], out: Path, header: dict[str, Any]
) -> list[tuple[str, str]]:
    """Write `out` from the pieces, and beside it what could not be read.

    Returns:
        Names and reasons of the images that could not be read.
    """
    parts = [open_weights(_piece(pieces, start)) for start in range(0, len(names), PIECE)]
    reasons = [reason for _, metadata in parts for reason in json.loads(metadata["reasons"])]
    ids = [name for name, reason in zip(names, reasons, strict=True) if not reason]
    missing = [row for row in zip(names, reasons, strict=True) if row[1]]
    if not ids:
        name, reason = missing[0]
        raise UserError(f"none of {len(names)} images can be read, for instance {name} ({reason})")
    readable = torch.cat([tensors["readable"] for tensors, _ in parts])
    features = torch.cat([tensors["features"] for tensors, _ in parts])[readable]
    if missing:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("path", "reason"), *missing])
        write_bytes(_unreadable(out), os.fsencode(table.getvalue()))
    else:
        with writing_to(_unreadable(out)):
            _unreadable(out).unlink(missing_ok=True)  # of the features that `out` replaces
    metadata = {"ids": json.dumps(ids), "msn": json.dumps(header)}
    save_tensors(out, {"features": features}, metadata)
    return missing


def _unreadable(out: Path) -> Path:
    """features.safetensors -> features.unreadable.csv: path and reason of what is left out."""
    return out.with_suffix(".unreadable.csv")


def _header(backbone: Backbone, source: Source, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "feature": settings["feature"],
        "checkpoint": str(settings["checkpoint"]),
        "root": str(settings["data"]["root"]),
        "model": backbone.model_config,
        "licence": backbone.meta["licence"],
        RECORDED: source.depth,
    }


def _digest(backbone: Backbone, source: Source, feature: str) -> str:
    """What must be the same for pieces of an earlier job to be taken over."""
    normalisation = [backbone.meta.get(name) for name in ("mean", "std")]
    images = images_key(map(Subset(source).identity, range(len(source))))
    parts = [feature, backbone.model_config, normalisation, images, weights_key(backbone)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _piece(pieces: Path, start: int) -> Path:
    return pieces / f"{start:010d}.safetensors"
