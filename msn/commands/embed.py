"""`python -m msn embed checkpoint=PATH data.root=DIR out=FILE`: a feature per image, with its name.

Pieces of the work are kept beside `out` until it is complete, so a stopped job can continue.
"""

import csv
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset

from msn.commands.entry import to_plain
from msn.commands.eval_lowshot import choose_device, without_views
from msn.commands.suggest_labels import images_of
from msn.data.datamodule import resolve_workers
from msn.data.dataset import Subset
from msn.data.layout import UNLABELLED
from msn.data.pools import PoolSettings, whole_source
from msn.data.sources import Source, find_depth
from msn.data.workers import in_one_line, less_memory, make_loader
from msn.errors import UserError
from msn.evaluation.features import (
    check_feature,
    digest_of,
    forward_feature,
    images_key,
    own_feature,
    weights_key,
)
from msn.files import utf8, write_bytes, write_file, writing_to
from msn.images.depth import RECORDED, check_depth, trained_depth
from msn.images.kinds import BadImageError
from msn.progress import Progress
from msn.schema import make, whole_number
from msn.weights import Backbone, ForeignBackbone, load_backbone
from msn.weights.tensors import open_weights, save_tensors

log = logging.getLogger(__name__)

# Images per piece: the most that a stopped job loses.
PIECE = 1024
# A safetensors header, which holds the names, is at most 100 MB.
MAX_ID_BYTES = 90_000_000
_MARKS = 4  # quotes, comma and space per name in the header
SHOWN = 10


class Embedded(NamedTuple):
    """Features of images."""

    names: list[str]
    """Paths of the images, relative to the folder or list."""
    labels: list[str | None] | None
    """Their classes, None where an image has none; None if none has one."""
    features: Tensor
    """[n, D] float32, in the order of `names`."""
    about: dict[str, Any]
    """Plain data: feature, checkpoint, root, model, licence."""


def run(config: DictConfig) -> Embedded:
    """Write features [n, D] float32 with the names and labels of the images in the same order.

    Returns:
        What was written.

    Raises:
        UserError: if a setting, path or file is wrong, `out` exists, or no image can be read.
    """
    settings = to_plain(without_views(config))
    out = Path(str(settings["out"])).resolve()
    _check(settings, out)
    data = make("data", images_of(settings["data"]), PoolSettings)
    backbone = load_backbone(
        settings["checkpoint"],
        num_heads=settings["model"]["num_heads"],
        key=settings["init_key"],
        family=settings["init_family"],
    )
    check_feature(settings["feature"], backbone.depth)
    settings["feature"] = own_feature(backbone.meta, backbone.resolve(settings["feature"]))
    if isinstance(backbone, ForeignBackbone):
        backbone.check(settings["feature"])
    source = whole_source(data)
    depth = trained_depth(check_depth(data.depth), [backbone.meta])
    source.depth = find_depth(source, depth)
    if out.suffix == ".safetensors" and _header_bytes(source) > MAX_ID_BYTES:
        raise UserError(
            f"data.root={data.root}: too many images for one safetensors file; embed its folders "
            "one by one, or write .parquet"
        )
    pieces = out.parent / f".{out.name}.{_digest(backbone, source, settings['feature'])}.part"
    try:
        with in_one_line(
            lambda: less_memory("batch_size", settings["batch_size"]),
            lambda: "; the same command continues",
        ):
            _embed(backbone, _Images(source, backbone), settings, pieces)
        embedded, missing = _join(pieces, source, out, _header(backbone, source, settings))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: finished pieces stay in {pieces}; the same command continues from them"
        ) from None
    shutil.rmtree(pieces, ignore_errors=True)
    for name, reason in missing[:SHOWN]:
        print(f"left out, cannot be read: {name} ({reason})")
    if missing:
        print(f"list of all that were left out: {_unreadable(out)}")
    print(f"{len(embedded.names)} images embedded, {len(missing)} left out: {out}")
    return embedded


class _Images(Dataset[tuple[Tensor, str]]):
    """Transformed images with an empty text; for an unreadable one, zeros with the reason."""

    def __init__(self, source: Source, backbone: Backbone | ForeignBackbone) -> None:
        self.source, self.transform, self.size = source, backbone.transform, backbone.img_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.transform(self.source.rgb(index)), ""
        except BadImageError as error:
            return torch.zeros(3, self.size, self.size), str(error) or "unreadable"


def _check(settings: dict[str, Any], out: Path) -> None:
    whole_number("batch_size", settings["batch_size"], 1)
    if out.is_dir():
        raise UserError(f"out={out} is a directory; it must be a file such as features.safetensors")
    if out.suffix not in WRITERS:
        raise UserError(f"out={out}: the name must end in one of {', '.join(WRITERS)}")
    if out.suffix == ".parquet":
        _pyarrow(out)
    if out.exists() and settings["overwrite"] is not True:
        raise UserError(f"out={out} exists; overwrite=true replaces it")


def _embed(
    backbone: Backbone | ForeignBackbone, images: _Images, settings: dict[str, Any], pieces: Path
) -> None:
    """Compute the missing pieces."""
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
                features = forward_feature(backbone, batch.to(device), settings["feature"])
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
    """Whether a piece is there as it was written; the log names a damaged one."""
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
        log.warning("%s is damaged; recomputing", piece)
    return whole


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: digest_of(tensor) for name, tensor in tensors.items()}


def _join(
    pieces: Path, source: Source, out: Path, header: dict[str, Any]
) -> tuple[Embedded, list[tuple[str, str]]]:
    """Write `out` from the pieces, and beside it a list of what could not be read.

    Returns:
        What was written, and names and reasons of the images that could not be read.
    """
    parts = [open_weights(_piece(pieces, start)) for start in range(0, len(source), PIECE)]
    reasons = [reason for _, metadata in parts for reason in json.loads(metadata["reasons"])]
    read = [i for i, reason in enumerate(reasons) if not reason]
    missing = [(source.name(i), reason) for i, reason in enumerate(reasons) if reason]
    if not read:
        name, reason = missing[0]
        count = len(source)
        raise UserError(f"none of {count} images can be read, for instance {name} ({reason})")
    readable = torch.cat([tensors["readable"] for tensors, _ in parts])
    features = torch.cat([tensors["features"] for tensors, _ in parts])[readable]
    if missing:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("path", "reason"), *missing])
        write_bytes(_unreadable(out), os.fsencode(table.getvalue()))
    else:
        with writing_to(_unreadable(out)):
            _unreadable(out).unlink(missing_ok=True)  # that of an older `out`
    labels = None if source.labels is None else [_label(source, i) for i in read]
    embedded = Embedded([source.name(i) for i in read], labels, features, header)
    write_embeddings(out, embedded)
    return embedded, missing


def _label(source: Source, i: int) -> str | None:
    assert source.labels is not None
    return None if source.labels[i] == UNLABELLED else source.classes[source.labels[i]]


def _header_bytes(source: Source) -> int:
    """Bytes of names and labels in a safetensors header."""
    classes = [] if source.labels is None else source.classes
    longest = max((len(json.dumps(name)) + _MARKS for name in classes), default=0)
    return sum(len(json.dumps(source.name(i))) + _MARKS + longest for i in range(len(source)))


def write_embeddings(out: Path, embedded: Embedded) -> None:
    """Write features with names and labels in the format of `out`'s suffix.

    Raises:
        UserError: the suffix is not one of `WRITERS`, or its library is not installed.
    """
    if out.suffix not in WRITERS:
        raise UserError(f"{out}: the name must end in one of {', '.join(WRITERS)}")
    WRITERS[out.suffix](out, embedded)


def _write_safetensors(out: Path, data: Embedded) -> None:
    metadata = {"ids": json.dumps(data.names), "msn": json.dumps(data.about)}
    if data.labels is not None:
        metadata["labels"] = json.dumps(data.labels)
    save_tensors(out, {"features": data.features}, metadata)


def _write_npz(out: Path, data: Embedded) -> None:
    columns: dict[str, Any] = {"path": np.array(data.names), "feature": data.features.numpy()}
    if data.labels is not None:
        columns["label"] = np.array([label or "" for label in data.labels])
    about = np.array(json.dumps(data.about))
    write_file(out, lambda file: np.savez(file, about=about, **columns))


def _write_csv(out: Path, data: Embedded) -> None:
    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        writer = csv.writer(text, lineterminator="\n")
        labels = [] if data.labels is None else ["label"]
        writer.writerow(["path", *labels, *(f"f{i}" for i in range(data.features.shape[1]))])
        for i, (name, feature) in enumerate(zip(data.names, data.features, strict=True)):
            label = [] if data.labels is None else [data.labels[i]]
            # float32 has 9 significant digits.
            writer.writerow([name, *label, *(f"{number:.9g}" for number in feature.tolist())])
        text.detach()

    write_file(out, write)


def _write_parquet(out: Path, data: Embedded) -> None:
    pyarrow = _pyarrow(out)
    width = data.features.shape[1]
    flat = pyarrow.array(data.features.numpy().reshape(-1))
    columns = {"path": pyarrow.array(list(map(utf8, data.names)))}
    if data.labels is not None:
        labels = [None if label is None else utf8(label) for label in data.labels]
        columns["label"] = pyarrow.array(labels)
    columns["feature"] = pyarrow.FixedSizeListArray.from_arrays(flat, width)
    table = pyarrow.table(columns).replace_schema_metadata({"msn": json.dumps(data.about)})
    write_file(out, lambda file: import_module("pyarrow.parquet").write_table(table, file))


def _pyarrow(out: Path) -> Any:
    try:
        return import_module("pyarrow")
    except ImportError as error:
        raise UserError(
            f"out={out}: needs `pip install 'msn-pretraining[hf]'` ({error})"
        ) from error


WRITERS: dict[str, Callable[[Path, Embedded], None]] = {
    ".safetensors": _write_safetensors,
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".csv": _write_csv,
}


def _unreadable(out: Path) -> Path:
    """features.safetensors -> features.unreadable.csv: paths of unreadable images, with reasons."""
    return out.with_suffix(".unreadable.csv")


def _header(
    backbone: Backbone | ForeignBackbone, source: Source, settings: dict[str, Any]
) -> dict[str, Any]:
    return {
        "feature": settings["feature"],
        "checkpoint": str(settings["checkpoint"]),
        "root": str(settings["data"]["root"]),
        "model": backbone.model_config,
        "licence": backbone.meta["licence"],
        RECORDED: source.depth,
    }


def _digest(backbone: Backbone | ForeignBackbone, source: Source, feature: str) -> str:
    """Digest of everything that must be equal to reuse the pieces of an earlier job."""
    made: Any = [backbone.meta.get(name) for name in ("mean", "std")]
    if isinstance(backbone, ForeignBackbone):
        made = backbone.card.preprocessing
    images = images_key(map(Subset(source).identity, range(len(source))))
    parts = [feature, backbone.model_config, made, images, weights_key(backbone)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _piece(pieces: Path, start: int) -> Path:
    return pieces / f"{start:010d}.safetensors"
