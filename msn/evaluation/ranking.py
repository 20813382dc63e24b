"""Measure a backbone without labels: RankMe, LiDAR, alpha-ReQ and intrinsic dimension."""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist
from scipy.stats import linregress
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from msn.data.dataset import Subset
from msn.data.sampler import permutation
from msn.errors import UserError
from msn.evaluation.augment import seeded
from msn.evaluation.backbones import Subject
from msn.evaluation.features import FeatureSettings, Runtime, is_replaced
from msn.evaluation.neighbours import effective_rank, rankme
from msn.evaluation.sets import UnlabelledImages

_CHOICE, _CROP = 8, 9  # keep these draws apart from others
_CROP_AREA = (0.3, 1.0)  # of the image, as rand views of the paper
_LIDAR_DELTA = 1e-4  # section 4 of the paper
_FIRST_EIGENVALUE = 3  # the power law holds between the first and the last of these
_LAST_EIGENVALUE = 50
_MST_SIZES = 8  # sizes of subsets, from an eighth of the images to all
_MST_DRAWS = 3  # subsets of each size


class Measures(NamedTuple):
    """Measures of one backbone's features; nan where these are not finite."""

    rankme: float
    """Effective rank of the features; more is better (see `neighbours.rankme`)."""
    lidar: float
    """Effective rank of the LDA matrix between images; more is better (see `lidar`)."""
    alpha: float
    """Decay of the eigenvalues; near 1 is best (see `alpha_req`)."""
    dimension: float
    """Intrinsic dimension; less is better (see `mst_dimension`)."""

    def goodness(self) -> dict[str, float]:
        """Every measure, turned so that more is better."""
        return {
            "rankme": self.rankme,
            "lidar": self.lidar,
            "alpha": -abs(self.alpha - 1),
            "dimension": -self.dimension,
        }


class Crops(UnlabelledImages):
    """Some images without labels: each whole, then as `views` random crops.

    Args:
        pool: all images.
        images: the most that are taken, chosen by `seed`.
        views: number of crops of 30 to 100 % of the area, aspect 3/4 to 4/3, not flipped.
        seed: of choice and crops.
    """

    def __init__(self, pool: Subset, *, images: int, views: int, seed: int) -> None:
        chosen = np.sort(permutation(len(pool), seed, _CHOICE)[:images])
        super().__init__(Subset(pool.source, pool.positions[chosen]))
        self.each, self.seed = 1 + views, seed

    @property
    def names(self) -> list[str]:
        """Names of the images, each repeated for its crops."""
        return [name for i in range(len(self.pool)) for name in [self.pool.name(i)] * self.each]

    def identity(self, i: int) -> str:
        """A key that changes with the content of image or crop i."""
        return f"{self.pool.identity(i // self.each)} crop {i % self.each} of seed {self.seed}"

    def __len__(self) -> int:
        """Number of images, times 1 + `views`."""
        return len(self.pool) * self.each

    def __getitem__(self, i: int) -> Image.Image:
        """The whole image if i is a multiple of 1 + `views`, else a crop of it."""
        image = super().__getitem__(i // self.each)
        if i % self.each == 0 or is_replaced(image):
            return image
        with seeded(self.seed, _CROP, i):
            place = RandomResizedCrop.get_params(image, list(_CROP_AREA), [3 / 4, 4 / 3])
        return F.crop(image, *place)


def measure(
    subject: Subject, images: Crops, settings: FeatureSettings, runtime: Runtime
) -> Measures:
    """All measures of one backbone; images that cannot be read are left out.

    Raises:
        UserError: fewer than 32 images can be read.
    """
    found = subject.features(images, settings, runtime, "images and crops")
    rows = found.rows.reshape(len(images.pool), images.each, -1)
    rows = rows[~found.replaced.reshape(len(rows), -1).any(dim=1)]
    if len(rows) < 32:
        raise UserError(f"data: {len(rows)} images can be read, at least 32 are needed")
    whole, crops = rows[:, 0].double(), rows[:, 1:].double()
    return Measures(rankme(whole), lidar(crops), alpha_req(whole), mst_dimension(whole))


def lidar(views: Tensor) -> float:
    """Effective rank of the LDA matrix between images (LiDAR, arXiv 2312.04000, section 4).

    Each image is a class, and its views are the members. B is the scatter of the images' means, W
    that of the views around them plus 1e-4 on its diagonal. The result is exp of the entropy of
    the eigenvalues of W^-1/2 B W^-1/2.

    Args:
        views: features, [n, q, D], q >= 2.

    Returns:
        In [1, min(n - 1, D)]; 0 where all images look the same.
    """
    means = views.mean(dim=1)
    between = (means - means.mean(dim=0)).double()
    within = (views - means.unsqueeze(1)).double().flatten(0, 1)
    count, size, width = views.shape
    scatter = within.T @ within / (count * (size - 1))
    scatter += _LIDAR_DELTA * torch.eye(width, dtype=scatter.dtype)
    values, vectors = torch.linalg.eigh(scatter)
    whitened = between @ vectors / values.sqrt()
    return effective_rank(torch.linalg.svdvals(whitened / math.sqrt(count - 1)).square())


def alpha_req(features: Tensor) -> float:
    """Exponent a of the covariance's eigenvalues, which decay as i^-a (alpha-ReQ, NeurIPS 2022).

    It is the slope of a least-squares line through log(eigenvalue) over log(i), for i from 3 to at
    most 50, without eigenvalues that are rounding noise. The paper finds about 1 best.

    Args:
        features: [n, D].

    Returns:
        >= 0; infinity if fewer than three eigenvalues are left: the features have collapsed.
    """
    centred = features.double() - features.double().mean(dim=0)
    values = torch.linalg.svdvals(centred).square()
    values = values[values > values[0] * 1e-12][:_LAST_EIGENVALUE]
    if len(values) < _FIRST_EIGENVALUE + 2:
        return math.inf
    places = torch.arange(1, len(values) + 1, dtype=values.dtype)
    tail = slice(_FIRST_EIGENVALUE - 1, None)
    line = linregress(places.log()[tail].numpy(), values.log()[tail].numpy())
    return float(-line.slope)


def mst_dimension(features: Tensor, seed: int = 0) -> float:
    """Intrinsic dimension by minimum spanning trees (IdEst, arXiv 2606.03338).

    The length of the tree over n points of a d-dimensional set grows as n^(1 - 1/d). d comes from
    the slope of a least-squares line through log(length) over log(n), for seeded subsets.

    Args:
        features: [n, D], n >= 32.
        seed: of the subsets.

    Returns:
        The dimension; 0 if all points are equal, infinity if the slope is 1 or more.
    """
    points = features.double().numpy()
    count, generator = len(points), np.random.default_rng(seed)
    lengths = []
    for size in np.geomspace(max(8, count // 8), count, _MST_SIZES).astype(int).tolist():
        for _ in range(_MST_DRAWS if size < count else 1):
            some = points[generator.permutation(count)[:size]]
            # Single linkage merges along the edges of the minimum spanning tree.
            lengths.append((size, linkage(pdist(some), "single")[:, 2].sum()))
    if lengths[-1][1] == 0:
        return 0.0
    sizes, sums = np.array([pair for pair in lengths if pair[1] > 0]).T
    slope = linregress(np.log(sizes), np.log(sums)).slope
    return float(1 / (1 - slope)) if slope < 1 else math.inf
