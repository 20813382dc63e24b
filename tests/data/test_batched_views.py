"""The batched back end gives what Pillow gives, and views depend on their coordinates alone."""

import os
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from sklearn.datasets import load_sample_images

from msn.data.batched_views import choose_kernel, make_batched_views
from msn.data.dataset import ImageBatch, PixelBuffer, Subset, TrainingSet
from msn.data.reference_views import make_reference_views
from msn.data.sampler import BatchKey
from msn.data.sources import folder_source
from msn.data.views import IMAGENET_STD, ViewSettings, draw_parameters

BUNDLED = Path(sklearn.__file__).parent / "datasets" / "images"
FOLDER = os.environ.get("MSN_TEST_IMAGES", str(BUNDLED))
NOTHING = {
    "flip_probability": 0.0,
    "jitter_probability": 0.0,
    "gray_probability": 0.0,
    "blur_probability": 0.0,
}
PAPER = {
    "rand_views": 1,
    "focal_views": 4,
    "rand_size": 224,
    "focal_size": 96,
    "patch_size": 16,
    "rand_scale": [0.3, 1.0],
    "focal_scale": [0.05, 0.3],
    "ratio": [0.75, 4 / 3],
    "flip_probability": 0.5,
    "jitter_probability": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "gray_probability": 0.2,
    "blur_probability": 0.5,
    "blur_radius": [0.1, 2.0],
}
CASES = {
    "crop": (NOTHING, 1.0),
    "flip": ({**NOTHING, "flip_probability": 1.0}, 1.0),
    "jitter": ({**NOTHING, "jitter_probability": 1.0}, 2.0),
    "gray": ({**NOTHING, "gray_probability": 1.0}, 2.0),
    "blur": ({**NOTHING, "blur_probability": 1.0}, 2.0),
    "full": ({}, 2.0),
}


def draw(settings, indices, *, seed=0, epoch=0):
    size = {"heights": np.full(len(indices), 427), "widths": np.full(len(indices), 640)}
    return draw_parameters(settings, seed=seed, epoch=epoch, indices=np.array(indices), **size)


def make_batch(settings, images=None):
    first, second = load_sample_images().images
    images = [first, second, first[:300, :400]] if images is None else images
    buffer = PixelBuffer(len(images))
    for image in images:
        buffer.add(image)
    pixels, starts, sizes = buffer.packed()
    indices = np.arange(len(images))
    parameters = draw_parameters(
        settings,
        seed=3,
        epoch=1,
        indices=indices,
        heights=sizes[:, 0].numpy(),
        widths=sizes[:, 1].numpy(),
    )
    table = torch.from_numpy(parameters.table)
    return ImageBatch(pixels, starts, sizes, table, 1, 0, torch.from_numpy(indices), [])


@pytest.mark.parametrize("kernel", ["each", "rounded", "together"])
@pytest.mark.parametrize("case", CASES)
def test_batched_views_equal_pillows(case, kernel):
    changes, limit = CASES[case]
    settings = ViewSettings(**{**PAPER, **changes})
    batch = make_batch(settings, load_sample_images().images if kernel == "together" else None)
    ours = make_batched_views(batch, settings, dtype=torch.float32, kernel=kernel)
    theirs = make_reference_views(batch, settings, device=torch.device("cpu"), dtype=torch.float32)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert a.shape == b.shape
        assert gray_levels(a - b) < limit


def test_images_are_cropped_alike_whatever_the_kernel(monkeypatch):
    settings = ViewSettings(**PAPER)
    batch = make_batch(settings, [image[:60, :64] for image in load_sample_images().images])
    each = make_batched_views(batch, settings, dtype=torch.float32, kernel="each")
    for at_a_time in (1, 256):
        monkeypatch.setattr("msn.data.batched_views._TOGETHER", at_a_time)
        together = make_batched_views(batch, settings, dtype=torch.float32, kernel="together")
        for a, b in zip(each[:3], together[:3], strict=True):
            assert (a - b).abs().max() < 1e-4


def test_the_kernel_follows_sizes():
    settings = ViewSettings(**PAPER)
    photo = load_sample_images().images[0]
    chosen = [
        choose_kernel(make_batch(settings, [photo[:height, :width] for height, width in sizes]))
        for sizes in ([(64, 32)] * 2, [(64, 65)] * 2, [(64, 32), (32, 64)])
    ]
    assert chosen == ["together", "rounded", "rounded"]


def test_a_very_long_image_is_cropped():
    settings = ViewSettings(**{**PAPER, **NOTHING})
    rows = np.arange(40_000, dtype=np.uint8)[None, :, None]
    batch = make_batch(settings, [np.repeat(rows, 3, 2), load_sample_images().images[0]])
    ours = make_batched_views(batch, settings, dtype=torch.float32, kernel="each")
    theirs = make_reference_views(batch, settings, device=torch.device("cpu"), dtype=torch.float32)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert gray_levels(a - b) < 1


def gray_levels(difference):
    """Mean absolute difference of normalised views in gray levels, 0 to 255."""
    return float((difference * 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_batched_views_equal_pillows_on_a_folder_of_photographs(case):
    """Those of MSN_TEST_IMAGES, else the two that scikit-learn ships."""
    changes, limit = CASES[case]
    settings = ViewSettings(**{**PAPER, **changes})
    source = folder_source(FOLDER, key="images", use_labels=False)
    photos = TrainingSet(Subset(source), settings, seed=0, reduce=False)
    differences = []
    for begin in range(0, len(source), 8):
        batch = photos[BatchKey(0, 0, np.arange(begin, min(begin + 8, len(source))))]
        ours = make_batched_views(batch, settings, dtype=torch.float32)
        theirs = make_reference_views(
            batch, settings, device=torch.device("cpu"), dtype=torch.float32
        )
        differences.append([gray_levels(a - b) for a, b in zip(ours[:3], theirs[:3], strict=True)])
    worst = np.mean(differences, axis=0).max()
    print(f"{case}: {worst:.2f} of 255 gray levels")
    assert worst < limit


def test_parameters_depend_on_seed_epoch_index_and_view_alone():
    settings = ViewSettings(**PAPER)
    several = draw(settings, [7, 3, 9]).table
    assert np.array_equal(several[:, 1:2], draw(settings, [3]).table)
    assert not np.array_equal(draw(settings, [3], seed=1).table, draw(settings, [3]).table)
    assert not np.array_equal(draw(settings, [3], epoch=1).table, draw(settings, [3]).table)
    assert len(np.unique(several[..., 5])) > 3
