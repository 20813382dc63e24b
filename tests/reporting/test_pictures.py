"""The contact sheet shows views as they are, and dropped patches as dropped."""

import numpy as np
import torch
from PIL import Image

from msn.data.views import IMAGENET_MEAN, IMAGENET_STD, Views
from msn.reporting.pictures import cover_dropped, view_pixels, views_sheet


def normalised(pixels):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.as_tensor(pixels).permute(2, 0, 1).float() / 255 - mean) / std


def test_a_view_is_shown_with_the_pixels_it_had():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    assert (view_pixels(normalised(pixels)) == pixels).all()


def test_exactly_the_dropped_patches_are_grey():
    pixels = np.zeros((8, 8, 3), np.uint8)
    covered = cover_dropped(pixels, torch.tensor([0, 3]), 4)
    grey = (covered == 128).all(-1)
    assert not grey[:4, :4].any()
    assert grey[:4, 4:].all()
    assert grey[4:, :4].all()
    assert not grey[4:, 4:].any()


def test_each_image_and_view_shows_its_own_mask():
    white = normalised(np.full((8, 8, 3), 255, np.uint8))
    views = Views(
        white.expand(2, 3, 8, 8),
        white.expand(1, 2, 3, 8, 8),
        white[:, :4, :4].expand(2, 2, 3, 4, 4),
    )
    kept = torch.tensor([[[1, 2, 3], [0, 1, 2]]])
    sheet = views_sheet(views, kept, patch_size=4, originals=[Image.new("RGB", (20, 10))] * 2)
    grey = (np.asarray(sheet)[20:] == 128).all(-1)  # below the captions
    assert grey.sum() == 2 * 48 * 48  # one patch of each image's rand view, drawn 48 px wide
    rows = np.flatnonzero(grey.any(1))
    assert rows[-1] - rows[0] + 1 == 96 + 6 + 96  # first patch of image 0, last patch of image 1
    assert (np.asarray(sheet) == 0).all(-1).sum() == 2 * 96 * 48  # the originals, kept in shape
