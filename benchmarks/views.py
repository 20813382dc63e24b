"""From files to views on one core: the product's ways beside torchvision's transforms on Pillow.

    python benchmarks/views.py [images=DIR] [json=FILE] [only=[decode,worker,pil_recipe]]

Rows have `ratio_to_pil`: images/s as a multiple of the Pillow recipe's, what most public code does.
"""

import random
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from rich.console import Console
from torch import Tensor
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.script import run_script
from msn.commands.bench import CPU, Way, photos, read_batch, view_rows, ways_to_views
from msn.data.reference_views import make_reference_views
from msn.data.sources import FileSource
from msn.data.views import IMAGENET_MEAN, IMAGENET_STD, ViewSettings, view_settings
from msn.errors import UserError

ORDER = (
    *("decode", "worker", "pil_recipe", "reference_views"),
    *("batched_views_cpu", "batched_views_cuda"),
)


def run(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Measure every way from files to views.

    Args:
        settings: of `msn.commands.bench.bench_views`, and `only`: names of ways beside the recipe,
            or None for all.
        console: where the table is shown.

    Returns:
        The rows of `msn.commands.bench.view_rows`.

    Raises:
        UserError: a setting is wrong, or the folder holds no readable image.
    """
    only = settings["only"]
    if only is not None and (not isinstance(only, list) or not {*only} <= {*ORDER}):
        raise UserError(f"only={only}: must be null or some of [{', '.join(ORDER)}]")
    views, source = view_settings(settings["views"]), photos(settings["images"])
    ways = ways_to_views(source, views) | compared_ways(source, views)
    names = [name for name in ORDER if name in ways]
    chosen = [name for name in names if only is None or name in (*only, "pil_recipe")]
    return view_rows({name: ways[name] for name in chosen}, source, views, console)


def compared_ways(source: FileSource, views: ViewSettings) -> dict[str, Way]:
    """The ways that the product is compared with."""
    recipe = pil_recipe(views)

    def by_recipe() -> None:
        for i in range(len(source)):
            recipe(Path(source.root, source.name(i)).read_bytes())

    def by_reference() -> None:
        batch = read_batch(source, views, reduce=False)
        make_reference_views(batch, views, device=CPU, dtype=torch.float32)

    return {"pil_recipe": by_recipe, "reference_views": by_reference}


def pil_recipe(settings: ViewSettings) -> Callable[[bytes], list[Tensor]]:
    """Make the transform that most public code would use: decode, then view by view through Pillow.

    Its random numbers are torchvision's own, so only its cost and its statistics can be compared.

    Args:
        settings: of the views.

    Returns:
        From an image file's bytes to the normalised views, target first.
    """
    large = _one_view(settings, settings.rand_size, settings.rand_scale)
    small = _one_view(settings, settings.focal_side, settings.focal_scale)

    def make(data: bytes) -> list[Tensor]:
        image = Image.open(BytesIO(data)).convert("RGB")
        views = [large(image) for _ in range(1 + settings.rand_views)]
        return views + [small(image) for _ in range(settings.focal_views)]

    return make


def _one_view(
    settings: ViewSettings, size: int, scale: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    jitter = transforms.ColorJitter(
        settings.brightness, settings.contrast, settings.saturation, settings.hue
    )

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*settings.blur_radius)))

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, ratio=settings.ratio),
            transforms.RandomHorizontalFlip(settings.flip_probability),
            transforms.RandomApply([jitter], settings.jitter_probability),
            transforms.RandomGrayscale(settings.gray_probability),
            transforms.RandomApply([transforms.Lambda(blur)], settings.blur_probability),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def main() -> None:
    """Run with the settings of the command line."""
    run_script(run, {"only": None}, what="views")


if __name__ == "__main__":
    main()
