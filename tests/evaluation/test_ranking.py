"""Label-free measures on features whose answer is known."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.cluster.hierarchy import linkage
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform

from msn.data.dataset import Subset
from msn.data.sources import folder_source
from msn.errors import UserError
from msn.evaluation.backbones import RawPixels
from msn.evaluation.features import FeatureSettings, Runtime
from msn.evaluation.ranking import Crops, Measures, alpha_req, lidar, measure, mst_dimension

SETTINGS = FeatureSettings(feature="native", image_size=None, batch_size=64, precision="32")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_alpha_is_the_exponent_of_the_eigenvalues(exponent):
    places = torch.arange(1, 101, dtype=torch.float64)
    directions, _ = torch.linalg.qr(normal(400, 100))
    directions = directions - directions.mean(dim=0)
    directions, _ = torch.linalg.qr(directions)
    assert alpha_req(directions * places ** (-exponent / 2)) == pytest.approx(exponent, abs=0.02)


def test_collapsed_features_are_the_worst_of_each_measure():
    line = normal(200, 1) @ normal(1, 32)
    spread = normal(200, 32, seed=1)
    assert alpha_req(line) == float("inf")
    assert mst_dimension(line) < 1.3
    views = line.unsqueeze(1) + 1e-6 * normal(200, 5, 32, seed=2)
    assert lidar(views) < 1.01
    assert lidar(spread.unsqueeze(1) + 1e-2 * normal(200, 5, 32, seed=2)) > 25
    assert mst_dimension(torch.zeros(64, 4)) == 0
    assert lidar(torch.ones(64, 3, 4)) == 0


@pytest.mark.parametrize("dimension", [2, 5])
def test_dimension_of_a_cube_in_a_larger_space(dimension):
    points = torch.rand(1000, dimension, generator=torch.Generator().manual_seed(0))
    rotated = points.double() @ torch.linalg.qr(normal(20, dimension))[0].T
    assert mst_dimension(rotated) == pytest.approx(dimension, rel=0.15)
    assert mst_dimension(7 * rotated) == pytest.approx(mst_dimension(rotated), rel=1e-4)


def test_single_linkage_has_the_length_of_the_minimum_spanning_tree():
    points = normal(90, 7).numpy()
    tree = minimum_spanning_tree(squareform(pdist(points))).sum()
    assert linkage(pdist(points), "single")[:, 2].sum() == pytest.approx(tree)


def test_lidar_asks_what_differs_between_images_and_not_between_views():
    """Four directions tell images apart, four others only views of one image."""
    images, noise = normal(300, 1, 8), normal(300, 10, 8, seed=1)
    images[..., 4:] = 0
    noise[..., :4] *= 1e-2
    assert lidar(images + noise) == pytest.approx(4, abs=0.3)


def folder(path, count=40):
    draw = np.random.default_rng(0)
    path.mkdir()
    for i in range(count):
        pixels = draw.integers(0, 255, (12, 10, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{i:02d}.png")
    return Subset(folder_source(str(path), key="data.root", use_labels=False))


def test_crops_are_the_same_every_time_and_the_first_is_the_image(tmp_path):
    pool = folder(tmp_path / "a")
    crops = Crops(pool, images=33, views=3, seed=1)
    assert len(crops) == len(crops.names) == 33 * 4
    assert len({crops.identity(i) for i in range(len(crops))}) == len(crops)
    assert crops[8].tobytes() == pool.source.rgb(int(crops.pool.positions[2])).tobytes()
    again = Crops(pool, images=33, views=3, seed=1)
    assert all(crops[i].tobytes() == again[i].tobytes() for i in range(12))
    assert crops[9].size != (10, 12) or crops[10].size != (10, 12)
    other = Crops(pool, images=33, views=3, seed=2)
    assert other.names != crops.names


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    pool = folder(tmp_path / "a")
    subject = RawPixels("pixels", 4)
    whole = measure(subject, Crops(pool, images=40, views=2, seed=0), SETTINGS, _cpu())
    assert isinstance(whole, Measures)
    for i in range(9):
        (tmp_path / "a" / f"{i:02d}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="31 images can be read, at least 32"):
        measure(subject, Crops(pool, images=40, views=2, seed=0), SETTINGS, _cpu())


def _cpu():
    return Runtime((torch.device("cpu"),))
