"""Pictures for a report: views, images nearest to prototypes, attention, a map of features.

`views_sheet` shows what target and anchors see of each image, with dropped patches in grey.
"""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from msn.data.batched_views import make_batched_views
from msn.data.dataset import TrainingSet
from msn.data.pools import PoolSettings, build_pools
from msn.data.sampler import BatchKey
from msn.data.views import IMAGENET_MEAN, IMAGENET_STD, Views, view_settings
from msn.evaluation.drawing import COLOURS
from msn.method.masking import PatchDrop, draw_key
from msn.reporting.curves import BELOW_TITLE, Chart
from msn.reporting.learned import Learned
from msn.schema import make, take

MOST_PROTOTYPES, NEAREST = 24, 8
VIEWED, ATTENDED, MOST_HEADS = 5, 8, 6
MOST_COLOURS = len(COLOURS) - 1
_THUMBNAIL, _ATTENTION_SIDE, _GAP = 64, 96, 4
_HEAT = np.array([224.0, 113.0, 42.0])


class Picture(NamedTuple):
    """An image in a page."""

    caption: str
    alt: str
    data: str
    """A data URI."""
    width: int
    height: int


class Gallery(NamedTuple):
    """Pictures under one title."""

    title: str
    help: str
    pictures: list[Picture]


def galleries(learned: Learned) -> list[Gallery]:
    """All galleries that a run allows."""
    is_mae = learned.settings["method"].get("kind") == "mae"  # it has no anchors
    found = [] if is_mae else [_views(learned)]
    if learned.assignments is not None:
        found.append(_prototypes(learned, learned.assignments))
    return [*found, _attention(learned)]


def feature_map(learned: Learned) -> Chart:
    """Features in the plane of their two largest principal components, one point per image."""
    unit = F.normalize(learned.features, dim=1).double()
    centred = unit - unit.mean(dim=0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    places = left[:, :2] * values[:2]
    if places.shape[1] < 2:
        places = F.pad(places, (0, 2 - places.shape[1]))
    shares = (values.square() / values.square().sum().clamp_min(1e-30)).tolist()[:2]
    traces = []
    for g, (name, rows) in enumerate(_groups(learned)):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [round(v, 4) for v in places[rows, 0].tolist()],
                "y": [round(v, 4) for v in places[rows, 1].tolist()],
                "text": [_title_of(learned, i) for i in rows],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {
                    "size": 7,
                    "color": COLOURS[g % len(COLOURS)],
                    "symbol": ["circle", "diamond", "square", "x"][g // len(COLOURS) % 4],
                    "opacity": 0.8,
                },
            }
        )
    told = " and ".join(f"{share:.0%}" for share in shares)
    axes = [{"title": {"text": f"component {k + 1}"}, "zeroline": False} for k in range(2)]
    by = "class" if learned.labels is not None else "strongest prototype"
    return Chart(
        "Map of features",
        f"Unit-length features of {len(learned.images):,} training images on their two "
        f"largest principal components ({told} of the variance), coloured by {by}.",
        {
            "data": traces,
            "layout": {
                "xaxis": axes[0],
                "yaxis": axes[1],
                "hovermode": "closest",
                "showlegend": True,
                "legend": BELOW_TITLE,
            },
        },
        f"Scatter plot of the features of {len(learned.images)} images, coloured by {by}: "
        + ", ".join(f"{trace['name']} {len(trace['x'])}" for trace in traces),
    )


def _views(learned: Learned) -> Gallery:
    """Views of the first epoch of a few images, with patches dropped as in the first step."""
    settings = learned.settings
    views = view_settings(settings["data"]["views"])
    pools = build_pools(make("data", settings["data"], PoolSettings))
    chosen = np.linspace(0, len(pools.train) - 1, VIEWED).round().astype(np.int64)
    images = TrainingSet(pools.train, views, seed=settings["seed"], reduce=False)
    batch = images[BatchKey(0, 0, chosen)]
    made = make_batched_views(batch, views, dtype=torch.float32)
    kept = PatchDrop(**take("method", settings["method"], PatchDrop)).draw(
        (views.rand_size // views.patch_size) ** 2,
        rand_views=views.rand_views,
        images=range(VIEWED),
        global_batch_size=VIEWED,
        key=draw_key(settings["seed"], 0),
    )
    originals = [Image.fromarray(batch.image(i).numpy()) for i in range(VIEWED)]
    sheet = views_sheet(
        made, kept, patch_size=views.patch_size, originals=originals, transparent=True
    )
    drop = settings["method"]["patch_drop"]
    told = (
        f"{VIEWED} training images with their target view, {views.rand_views} rand and "
        f"{views.focal_views} focal anchors; {drop:.0%} of the patches of rand anchors are dropped"
    )
    return Gallery(
        "Views and dropped patches",
        "One row per image. Anchors must predict the target's assignment from what they see. "
        "Dropped patches are grey.",
        [as_picture(sheet, told, f"Contact sheet: {told}.")],
    )


def _prototypes(learned: Learned, assignments: Tensor) -> Gallery:
    """The images nearest to each prototype in use."""
    strongest = assignments.argmax(dim=1)
    counts = torch.bincount(strongest, minlength=assignments.shape[1])
    used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    pictures = []
    for prototype in used[:MOST_PROTOTYPES].tolist():
        nearest = assignments[:, prototype].argsort(descending=True)[:NEAREST].tolist()
        share = int(counts[prototype]) / len(strongest)
        caption = f"prototype {prototype}: {share:.1%} of images"
        pictures.append(
            as_picture(
                strip([sized(learned.images[i], _THUMBNAIL) for i in nearest]),
                caption,
                f"The {len(nearest)} images nearest to {caption}{_class_mix(learned, nearest)}.",
            )
        )
    return Gallery(
        "Images nearest to prototypes",
        f"{len(used):,} of {assignments.shape[1]:,} prototypes are the strongest of at least one "
        f"of {len(strongest):,} training images; the {len(pictures)} most used, each with its "
        "nearest images. A meaningful prototype shows images that belong together.",
        pictures,
    )


def _attention(learned: Learned) -> Gallery:
    """Where the class token of the last block looks."""
    count = len(learned.images)
    chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(ATTENDED, count))})
    weights = learned.attention(chosen).cpu().numpy()
    heads = weights.shape[1]
    pictures = []
    for i, maps in zip(chosen, weights, strict=True):
        image = learned.images[i]
        cells = [sized(image, _ATTENTION_SIDE)]
        shown = [maps.mean(axis=0), *maps[:MOST_HEADS]]
        cells += [sized(_heated(image, weight), _ATTENTION_SIDE) for weight in shown]
        pictures.append(
            as_picture(
                strip(cells),
                _title_of(learned, i),
                f"Image {_title_of(learned, i)}, the mean attention of its class token over "
                f"{heads} heads, and that of {len(shown) - 1} single heads.",
            )
        )
    return Gallery(
        "Attention of the class token, last block",
        f"From left: the image, the mean over {heads} heads, then single heads. Orange is where "
        "the class token looks.",
        pictures,
    )


def _heated(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """The image in grey, with more orange the larger the weight of a patch."""
    grey = np.asarray(image.convert("L").convert("RGB"), np.float64)
    heat = Image.fromarray((weights / max(weights.max(), 1e-12)).astype(np.float32))
    how = Image.Resampling.NEAREST if image.width <= _ATTENTION_SIDE else Image.Resampling.BICUBIC
    share = np.asarray(heat.resize(image.size, how)).clip(0, 1)[..., None] * 0.85
    return Image.fromarray((grey * (1 - share) + _HEAT * share).round().astype(np.uint8))


def _groups(learned: Learned) -> list[tuple[str, list[int]]]:
    """Images by class, else by strongest prototype: the largest groups, then all others as one."""
    if learned.labels is not None:
        numbers, names = learned.labels, learned.classes
    elif learned.assignments is not None:
        numbers = learned.assignments.argmax(dim=1).numpy()
        names = [f"prototype {k}" for k in range(learned.assignments.shape[1])]
    else:
        return [("images", list(range(len(learned.images))))]
    counts = np.bincount(numbers, minlength=len(names))
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    most = len(order) if len(order) <= 2 * len(COLOURS) else MOST_COLOURS
    first = sorted(order[:most])
    groups = [(names[k], np.flatnonzero(numbers == k).tolist()) for k in first]
    rest = np.flatnonzero(~np.isin(numbers, first)).tolist()
    return [*groups, ("others", rest)] if rest else groups


def _title_of(learned: Learned, i: int) -> str:
    name = learned.names[i]
    if learned.labels is None:
        return name
    return f"{name} ({learned.classes[int(learned.labels[i])]})"


def _class_mix(learned: Learned, chosen: Sequence[int]) -> str:
    if learned.labels is None:
        return ""
    numbers, counts = np.unique(learned.labels[list(chosen)], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    told = ", ".join(f"{counts[k]} of {learned.classes[int(numbers[k])]}" for k in order)
    return f" ({told})"


def sized(image: Image.Image, side: int) -> Image.Image:
    """A square of `side` px: enlarged without smoothing, so pixels stay visible, or reduced."""
    how = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
    return image.resize((side, side), how)


def strip(cells: Sequence[Image.Image]) -> Image.Image:
    """Images side by side on transparent ground."""
    width = sum(cell.width for cell in cells) + _GAP * (len(cells) - 1)
    strip = Image.new("RGBA", (width, max(cell.height for cell in cells)), (0, 0, 0, 0))
    left = 0
    for cell in cells:
        strip.paste(cell, (left, 0))
        left += cell.width + _GAP
    return strip


def as_picture(image: Image.Image, caption: str, alt: str) -> Picture:
    """An image as WebP, for a page."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85, method=4)
    data = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(caption, alt, data, image.width, image.height)


# Least and greatest side in px of large views on the sheet; small images are enlarged.
LEAST_SIDE, GREATEST_SIDE = 96, 224
_SHEET_GAP, _CAPTION = 6, 18
_PAPER, _INK, _DROPPED = (255, 255, 255), (60, 60, 60), (128, 128, 128)
# Captions that can be read on light and on dark ground.
_NO_PAPER, _INK_ON_ANY = (0, 0, 0, 0), (128, 128, 128, 255)


def views_sheet(
    views: Views,
    kept: Tensor | None,
    *,
    patch_size: int,
    originals: Sequence[Image.Image],
    masked: str = "rand",
    transparent: bool = False,
) -> Image.Image:
    """Draw one row per image: the original, the target, rand anchors, focal anchors.

    Patches that a rand anchor does not see are covered in grey.

    Args:
        views: normalised views of B images.
        kept: patches that rand anchors keep, [M] or [R, B, M]; None keeps all.
        patch_size: side of a patch in px of the views.
        originals: the B images before they were cropped, any size.
        masked: caption of rand anchors.
        transparent: make the ground between the views transparent (RGBA), for light and dark pages.

    Returns:
        An RGB image, or RGBA if `transparent`. Views of `rand_size` px are drawn with a side of 96
        to 224 px, focal views at the same scale.
    """
    size, images = views.target.shape[-1], views.target.shape[0]
    side = min(max(size, LEAST_SIDE), GREATEST_SIDE)
    small_side = round(side * views.focal.shape[-1] / size)
    rows = []
    for i in range(images):
        target = Image.fromarray(view_pixels(views.target[i]))
        cells = [_contained(originals[i], side), sized(target, side)]
        for r, view in enumerate(views.rand[:, i]):
            covered = cover_dropped(view_pixels(view), _kept_of(kept, r, i), patch_size)
            cells.append(sized(Image.fromarray(covered), side))
        cells += [
            sized(Image.fromarray(view_pixels(view)), small_side) for view in views.focal[:, i]
        ]
        rows.append(cells)
    captions = ["original", "target", *[masked] * len(views.rand), *["focal"] * len(views.focal)]
    return tiled(rows, captions, transparent=transparent)


def view_pixels(
    view: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> np.ndarray:
    """A view [3, h, w], normalised by `mean` and `std`, as pixels, uint8 [h, w, 3]."""
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    pixels = (view.detach().float().cpu() * scale + shift).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()


def cover_dropped(pixels: np.ndarray, kept: Tensor | None, patch_size: int) -> np.ndarray:
    """Paint dropped patches grey.

    Args:
        pixels: uint8 [h, w, 3].
        kept: 0-based row-major numbers of the patches that stay, [M]; None is all.
        patch_size: side of a patch in px.

    Returns:
        A painted copy.
    """
    if kept is None:
        return pixels
    rows, columns = (side // patch_size for side in pixels.shape[:2])
    seen = np.zeros(rows * columns, bool)
    seen[kept.cpu().numpy()] = True
    mask = seen.reshape(rows, columns).repeat(patch_size, 0).repeat(patch_size, 1)
    return np.where(mask[..., None], pixels, np.uint8(_DROPPED[0]))


def _kept_of(kept: Tensor | None, rand_view: int, image: int) -> Tensor | None:
    return kept if kept is None or kept.ndim == 1 else kept[rand_view, image]


def _contained(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image.resize((width, height), how)


def tiled(rows: list[list[Image.Image]], captions: list[str], *, transparent: bool) -> Image.Image:
    """Columns as wide as their widest cell, a caption above each."""
    widths = [max(max(cell.width for cell in column), 40) for column in zip(*rows, strict=True)]
    heights = [max(cell.height for cell in row) for row in rows]
    size = (
        sum(widths) + _SHEET_GAP * (len(widths) + 1),
        _CAPTION + sum(heights) + _SHEET_GAP * (len(heights) + 1),
    )
    sheet = Image.new("RGBA", size, _NO_PAPER) if transparent else Image.new("RGB", size, _PAPER)
    ink = _INK_ON_ANY if transparent else _INK
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    lefts = [_SHEET_GAP + sum(widths[:i]) + _SHEET_GAP * i for i in range(len(widths))]
    for left, caption in zip(lefts, captions, strict=True):
        draw.text((left, 3), caption, fill=ink, font=font)
    top = _CAPTION + _SHEET_GAP
    for row, height in zip(rows, heights, strict=True):
        for left, cell in zip(lefts, row, strict=True):
            sheet.paste(cell, (left, top))
        top += height + _SHEET_GAP
    return sheet
