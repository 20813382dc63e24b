"""The views of the batched back end are distributed like those of the reference."""

import json
import os

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from benchmarks.views import pil_recipe
from msn.data.batched_views import make_batched_views
from msn.data.dataset import Subset, TrainingSet
from msn.data.sampler import BatchKey
from msn.data.sources import folder_source
from msn.data.views import IMAGENET_MEAN, IMAGENET_STD, ViewSettings
from tests.conftest import ROOT
from tests.data.test_batched_views import PAPER
from tests.images.test_decode import encode

SETTINGS = ViewSettings(**{**PAPER, "rand_views": 0, "focal_views": 2})  # a large and two small
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def measure(views):
    """The figures of `view_statistics.json` for normalised views [n, 3, s, s]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = (views * std + mean).clamp(0, 1)
    luma = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    inner = luma[:, 1:-1, 1:-1]
    beside = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    spread = x.amax(1) - x.amin(1)
    colours = x.mean((2, 3))
    return {
        "red_mean": colours[:, 0],
        "green_mean": colours[:, 1],
        "blue_mean": colours[:, 2],
        "luminance_std": luma.flatten(1).std(1),
        "saturation": spread.mean((1, 2)),
        "gray": (spread.amax((1, 2)) < 2 / 255).float(),
        "laplacian": (beside - 4 * inner).abs().mean((1, 2)),
        "clipped": ((x <= 1 / 255) | (x >= 254 / 255)).float().mean((1, 2, 3)),
    }


def batched_statistics(source, draws):
    """All figures of `draws` epochs of a source, for large and small views."""
    images = TrainingSet(Subset(source), SETTINGS, seed=0, reduce=True)
    parts = {"rand": [], "focal": []}
    for epoch in range(draws):
        for begin in range(0, len(source), 40):
            indices = np.arange(begin, min(begin + 40, len(source)))
            views = make_batched_views(
                images[BatchKey(epoch, 0, indices)], SETTINGS, dtype=torch.float32
            )
            parts["rand"].append(measure(views.target))
            parts["focal"].append(measure(views.focal.flatten(0, 1)))
    return {kind: gather(rows) for kind, rows in parts.items()}


def gather(rows):
    return {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}


@pytest.mark.slow
@pytest.mark.skipif("MSN_TEST_IMAGES" not in os.environ, reason="needs the reference's photos")
def test_the_reference_s_statistics_of_its_photos():
    """MSN_TEST_IMAGES must be the 120 photos that the figures were computed from."""
    source = folder_source(os.environ["MSN_TEST_IMAGES"], key="images", use_labels=False)
    if len(source) != 120:
        pytest.skip("the figures are of 120 photos")
    reference = json.loads((ROOT / "tests" / "golden" / "view_statistics.json").read_text())
    ours = batched_statistics(source, draws=12)
    for kind, count in (("rand", 1440), ("focal", 2880)):
        for name, values in ours[kind].items():
            assert len(values) == reference[kind]["views"] == count
            figures = reference[kind][name]
            # Two samples of so many views differ by 0.04 (0.03) standard deviations on average.
            assert abs(values.mean() - figures["mean"]) < 0.12 * figures["std"], (kind, name)
            assert abs(values.std() - figures["std"]) < 0.2 * figures["std"], (kind, name)
            for q in QUANTILES:
                distance = abs(np.quantile(values, q) - figures[f"q{round(100 * q):02d}"])
                # Tails, of clipping above all, scatter more; 0.17 was seen, at 95 %.
                assert distance < 0.25 * figures["std"], (kind, name, q)


@pytest.mark.slow
def test_torchvision_s_statistics_of_two_photos(tmp_path):
    draws = 150
    data = []
    from PIL import Image

    for number, pixels in enumerate(load_sample_images().images):
        data.append(encode(Image.fromarray(pixels), "JPEG", quality=95))
        (tmp_path / f"{number}.jpg").write_bytes(data[-1])
    ours = batched_statistics(
        folder_source(str(tmp_path), key="images", use_labels=False), draws=draws
    )
    recipe = pil_recipe(SETTINGS)
    torch.manual_seed(0)
    views = [recipe(photo) for _ in range(draws) for photo in data]
    theirs = {
        "rand": gather([measure(torch.stack([v[0] for v in views]))]),
        "focal": gather([measure(torch.stack([f for v in views for f in v[1:]]))]),
    }
    for kind in ours:
        for name, values in ours[kind].items():
            other = theirs[kind][name]
            assert len(values) == len(other)
            # Standard error of such a difference: 0.08 standard deviations (0.06 for focal views).
            assert abs(values.mean() - other.mean()) < 0.3 * other.std() + 1e-3, (kind, name)
