"""`python -m msn show_reconstruction checkpoint=PATH data.root=DIR out=mae.png`: MAE's picture."""

import logging

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from msn.commands.entry import to_plain
from msn.commands.eval_lowshot import check_seed, choose_device, without_views
from msn.commands.show_views import picture_path, write_picture
from msn.commands.suggest_labels import images_of
from msn.data.pools import PoolSettings, whole_source
from msn.data.sources import Source
from msn.errors import UserError
from msn.images.kinds import BadImageError
from msn.reporting.reconstruction import reconstruction_caption, reconstruction_sheet
from msn.schema import make, whole_number
from msn.weights.mae import LoadedMAE, load_mae

log = logging.getLogger(__name__)

_MOST_IMAGES = 256


def run(config: DictConfig) -> None:
    """Mask some images, reconstruct them and draw both.

    Raises:
        UserError: if a setting, path or file is wrong, the file holds no decoder, or no image can
            be read.
    """
    settings = to_plain(without_views(config))
    out, seed = picture_path(settings["out"]), check_seed(settings["seed"])
    count = min(whole_number("images", settings["images"], 1), _MOST_IMAGES)
    ratio, normalised = settings["mask_ratio"], settings["norm_pix_loss"]
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float)):
        raise UserError(f"mask_ratio must be in (0, 1), got {ratio!r}")
    if normalised not in (True, False, None):
        raise UserError(f"norm_pix_loss must be true, false or null, got {normalised!r}")
    mae = load_mae(
        settings["checkpoint"],
        num_heads=settings["model"]["num_heads"],
        key=settings["init_key"],
        decoder=settings["decoder"],
        mask_ratio=ratio,
        norm_pix_loss=normalised,
    )
    if not mae.decoder_from_file:
        raise UserError(
            f"checkpoint={settings['checkpoint']}: holds no decoder to reconstruct with"
        )
    data = {**images_of(settings["data"]), "use_labels": False}
    images = _images(whole_source(make("data", data, PoolSettings)), count, mae)
    mae.to(choose_device(settings["device"]))
    write_picture(out, reconstruction_sheet(mae, images, seed=seed))
    print(f"{reconstruction_caption(mae, len(images))}: {out}")


def _images(source: Source, count: int, mae: LoadedMAE) -> Tensor:
    """Images spread over a data set, as the network takes them, [n, 3, S, S]."""
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    found = []
    for i in chosen.tolist():
        try:
            found.append(mae.transform(source.rgb(i)))
        except BadImageError as error:
            log.warning("left out, cannot be read: %s (%s)", source.name(i), error)
    if not found:
        raise UserError(f"{source.where}: none of the chosen images can be read")
    return torch.stack(found)
