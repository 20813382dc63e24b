"""`python -m msn show_views data.root=DIR out=views.png`: draw the views that networks see."""

import io
import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from msn.commands.adaptation import follow_init
from msn.commands.entry import to_plain
from msn.commands.eval_lowshot import refuse_other_target
from msn.data.batched_views import make_batched_views
from msn.data.dataset import ImageBatch, TrainingSet
from msn.data.pools import Pools, PoolSettings, build_pools
from msn.data.reference_views import make_reference_views
from msn.data.sampler import BatchKey, EpochSampler
from msn.data.views import ViewSettings, draw_noise, view_settings
from msn.errors import UserError
from msn.files import write_bytes
from msn.method.mae import num_unmasked_patches
from msn.method.masking import PatchDrop, draw_key
from msn.reporting.pictures import views_sheet
from msn.schema import make, take, whole_number
from msn.training.cost import bytes_of_views, memory_installed

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def run(config: DictConfig) -> None:
    """Draw the first views and masks of an epoch of a training with these settings.

    Raises:
        UserError: if a setting or a path is wrong, or no image can be read.
    """
    refuse_other_target(config)
    follow_init(config)
    settings = to_plain(config)
    out = picture_path(settings["out"])
    images = whole_number("images", settings["images"], 1)
    epoch, seed = (
        whole_number("epoch", settings["epoch"], 0),
        whole_number("seed", settings["seed"], 0),
    )
    data = settings["data"]
    views = view_settings(data["views"])
    _refuse_beyond_reason(images, views)
    is_mae = "mask_ratio" in settings["method"]
    if is_mae:
        num_unmasked_patches(
            (views.rand_size // views.patch_size) ** 2, settings["method"]["mask_ratio"]
        )
    else:
        drop = PatchDrop(**take("method", settings["method"], PatchDrop))
    pools = build_pools(make("data", data, PoolSettings))
    order = _order(pools, data["global_batch_size"], seed)
    key = order.keys(epoch)[0]
    batch = _read(pools, views, seed, BatchKey(epoch, key.batch, key.indices[:images]))
    if data["backend"] == "reference":
        made = make_reference_views(batch, views, device=torch.device("cpu"), dtype=torch.float32)
    else:
        made = make_batched_views(batch, views, dtype=torch.float32)
    if is_mae:
        made = made._replace(rand=made.target[None])  # its only view, for the masks
        kept: Tensor | None = _kept_by_mae(settings["method"]["mask_ratio"], views, batch, seed)
    else:
        kept = drop.draw(
            (views.rand_size // views.patch_size) ** 2,
            rand_views=views.rand_views,
            images=range(len(batch.indices)),
            global_batch_size=order.global_batch_size,
            key=draw_key(seed, epoch * len(order)),
        )
    originals = [Image.fromarray(batch.image(i).numpy()) for i in range(len(batch.indices))]
    sheet = views_sheet(
        made,
        kept,
        patch_size=views.patch_size,
        originals=originals,
        masked="masked" if is_mae else "rand",
    )
    write_picture(out, sheet)
    print(
        f"{len(originals)} of {len(pools.train)} images with {views.num_views} views each, "
        f"{sheet.width} x {sheet.height} px: {out}"
    )


def _kept_by_mae(mask_ratio: float, views: ViewSettings, batch: ImageBatch, seed: int) -> Tensor:
    """Patches that a masked autoencoder sees of each image in this epoch, [1, B, M]."""
    count = (views.rand_size // views.patch_size) ** 2
    indices = batch.indices.numpy()
    noise = draw_noise(seed=seed, epoch=batch.epoch, indices=indices, count=count)
    kept = torch.from_numpy(noise).argsort(dim=1, stable=True)
    return kept[None, :, : num_unmasked_patches(count, mask_ratio)]


def write_picture(out: Path, picture: Image.Image) -> None:
    """Write a picture, all or nothing, in the format of its suffix."""
    buffer = io.BytesIO()
    picture.save(buffer, format=Image.registered_extensions()[out.suffix.lower()])
    write_bytes(out, buffer.getvalue())


def picture_path(out: Any) -> Path:
    """The path of a picture to write.

    Raises:
        UserError: if its suffix or its directory is wrong.
    """
    path = Path(str(out))
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"out={path}: must end in {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"out={path}: name a file in an existing directory")
    return path


def _refuse_beyond_reason(images: int, views: ViewSettings) -> None:
    """Refuse a sheet whose views do not fit into memory: swapping would take hours."""
    needed, limit = bytes_of_views(views, images, 4), memory_installed()
    if needed > limit:
        raise UserError(
            f"views of {images} images would take {needed / 2**30:,.0f} GiB and there are "
            f"{limit / 2**30:,.0f}: lower images, or the number or size of data.views"
        )


def _order(pools: Pools, global_batch_size: int, seed: int) -> EpochSampler:
    """The training's order, with a smaller batch for a folder that is too small to train on."""
    count = len(pools.train)
    size = min(whole_number("data.global_batch_size", global_batch_size, 1), count)
    return EpochSampler(num_images=count, global_batch_size=size, seed=seed, rank=0, world_size=1)


def _read(pools: Pools, views: ViewSettings, seed: int, key: BatchKey) -> ImageBatch:
    batch = TrainingSet(pools.train, views, seed=seed, reduce=False)[key]
    for bad in batch.bad:
        log.warning("replaced an unreadable image: %s (%s)", bad.path, bad.reason)
    if batch.bad and int(batch.sizes.prod(1).min()) <= 1:
        bad = batch.bad[-1]
        raise UserError(f"data.root: no image can be read; for instance {bad.path} ({bad.reason})")
    return batch
