"""Choose the images to label first: the most typical ones of each prototype or cluster.

Legend: n images, D feature width, K prototypes, N images to label.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from msn.errors import UserError

METHODS = ("prototypes", "medoids")

_ROUNDS = 100  # at most; k-medoids has always converged in fewer


class Choice(NamedTuple):
    """Images to label, in order of priority."""

    positions: Tensor
    """[N]."""
    groups: Tensor
    """The prototype or cluster that each represents, [N]."""
    sizes: Tensor
    """Images in that group, [N]."""


def cover_prototypes(cosines: Tensor, features: Tensor, budget: int) -> Choice:
    """Choose the most typical images of the used prototypes.

    Every image belongs to its nearest prototype. If the budget is below the number of used
    prototypes, k-medoids over prototypes, weighted by use, selects some of them. Otherwise the
    budget is distributed by use, and k-medoids spreads several places of a prototype over its
    images.

    Args:
        cosines: of projections and prototypes, [n, K].
        features: of the same images, for spreading inside a prototype, [n, D].
        budget: N, in [1, n].

    Raises:
        UserError: the budget is out of range.
    """
    _check_budget(budget, len(cosines))
    nearest = cosines.max(dim=1)
    use = torch.bincount(nearest.indices, minlength=cosines.shape[1])
    used = torch.nonzero(use)[:, 0]
    if budget < len(used):
        # Prototypes are near each other where the same images are near both.
        profiles = F.normalize((cosines - cosines.mean(dim=0))[:, used].T, dim=1)
        chosen = used[_medoids(profiles, budget, use[used].to(profiles.dtype))]
        places = torch.zeros_like(use).index_fill_(0, chosen, 1)
    else:
        places = share_out(use, budget)
    rows = _unit_rows(features)
    positions, groups = [], []
    for prototype in torch.nonzero(places)[:, 0].tolist():
        members = torch.nonzero(nearest.indices == prototype)[:, 0]
        wanted = int(places[prototype])
        if wanted == 1:
            best = members[nearest.values[members].argmax()].unsqueeze(0)
        else:
            best = members[_medoids(rows[members], wanted, torch.ones_like(rows[members][:, 0]))]
        positions.append(best)
        groups.append(torch.full_like(best, prototype))
    return _largest_first(torch.cat(positions), torch.cat(groups), use)


def k_medoids(features: Tensor, budget: int) -> Choice:
    """Choose the medoids of N clusters of centred, normalised features by cosine.

    Args:
        features: [n, D].
        budget: N, in [1, n].

    Raises:
        UserError: the budget is out of range.
    """
    _check_budget(budget, len(features))
    rows = _unit_rows(features)
    positions = _medoids(rows, budget, torch.ones_like(rows[:, 0]))
    groups = (rows @ rows[positions].T).argmax(dim=1)
    sizes = torch.bincount(groups, minlength=budget)
    return _largest_first(positions, torch.arange(budget), sizes)


def share_out(use: Tensor, budget: int) -> Tensor:
    """Places for each prototype: one if it is used, the rest where most images share one place.

    Args:
        use: images of each prototype, [K].
        budget: at least the number of used prototypes, at most the number of images.

    Returns:
        Places, [K], none above `use`.
    """
    places = (use > 0).long()
    while int(places.sum()) < budget:
        per_place = torch.where(places < use, use / places.clamp_min(1), -1.0)
        places[per_place.argmax()] += 1
    return places


def _medoids(rows: Tensor, count: int, weights: Tensor) -> Tensor:
    """Weighted k-medoids of unit rows by cosine: rows [n, D], weights [n] -> positions [count].

    It starts from greedy choices, so it needs no seed. The medoid of a cluster is the member with
    the largest cosine to the members' sum.
    """
    medoids = _greedy(rows, count, weights)
    for _ in range(_ROUNDS):
        cluster = (rows @ rows[medoids].T).argmax(dim=1)
        cluster[medoids] = torch.arange(count)  # also where rows are equal
        sums = torch.zeros(count, rows.shape[1], dtype=rows.dtype)
        sums.index_add_(0, cluster, rows * weights.unsqueeze(1))
        fit = (rows * sums[cluster]).sum(dim=1)
        best = torch.full((count,), -torch.inf, dtype=fit.dtype)
        best.scatter_reduce_(0, cluster, fit, "amax")
        # Among equal members the first; the current medoid stays unless another is better.
        order = torch.nonzero(fit >= best[cluster]).flatten().flip(0)
        after = medoids.clone()
        after[cluster[order]] = order
        stay = fit[medoids] >= fit[after]
        after[stay] = medoids[stay]
        if torch.equal(after, medoids):
            break
        medoids = after
    return medoids


def _greedy(rows: Tensor, count: int, weights: Tensor) -> Tensor:
    """Start with the most central row, then add the worst represented one (farthest first).

    The rounds that follow replace outliers by members of their clusters.
    """
    first = (rows @ (rows * weights.unsqueeze(1)).sum(dim=0)).argmax()
    chosen, nearest = [int(first)], rows @ rows[first]
    while len(chosen) < count:
        distance = weights * (1 - nearest)
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        nearest = torch.maximum(nearest, rows @ rows[chosen[-1]])
    return torch.tensor(chosen)


def _unit_rows(features: Tensor) -> Tensor:
    """Features minus their mean, which all images share, then normalised."""
    return F.normalize(features - features.mean(dim=0), dim=1)


def _largest_first(positions: Tensor, groups: Tensor, sizes: Tensor) -> Choice:
    order = torch.argsort(sizes[groups], descending=True, stable=True)
    groups = groups[order]
    return Choice(positions[order], groups, sizes[groups])


def _check_budget(budget: int, count: int) -> None:
    if not 1 <= budget <= count:
        raise UserError(f"budget={budget}: must be in [1, {count}] (images)")


_CELL = 112  # px, thumbnail and margin
_THUMBNAIL = 104
_CAPTION = 16
_COLUMNS = 10
_INK = (20, 20, 20)


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Lay out images in rows of ten, uncropped, each above its caption.

    Args:
        images: RGB, of any size; small ones are enlarged without smoothing.
        captions: one per image, a few characters.
    """
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    height = _CELL + _CAPTION
    sheet = Image.new("RGB", (columns * _CELL, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        scale = _THUMBNAIL / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        left, top = i % columns * _CELL, i // columns * height
        offset = (left + (_CELL - size[0]) // 2, top + (_CELL - size[1]) // 2)
        sheet.paste(image.resize(size, filter_), offset)
        draw.text((left + _CELL / 2, top + _CELL), caption, fill=_INK, font=font, anchor="ma")
    return sheet
