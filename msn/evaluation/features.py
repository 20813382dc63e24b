"""Frozen features of labelled images: extracted once, over all devices and processes, and kept.

The paper's feature is the class token of the target trunk's last block *before* the final norm
(A.2), from one centre crop.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from msn.data.dataset import REPLACED
from msn.data.workers import make_loader
from msn.errors import UserError
from msn.evaluation.cache import FeatureCache, images_key, weights_key
from msn.progress import Progress

log = logging.getLogger(__name__)

PRECISIONS = ("32", "bf16")
# Images of a part: what an interrupted extraction loses at most, per device.
_PART = 4096
# Of a batch: 24 GB in float32, of three channels.
_MOST_PIXELS = 2e9
_LARGEST_SIDE = 8192  # px; Pillow takes crops of more than 13,377 for an attack


class LabelledSet(Protocol):
    """Labelled images as the data room gives them."""

    @property
    def labels(self) -> Tensor:
        """Class numbers, [n]."""

    @property
    def names(self) -> list[str]:
        """Names of the images, in order."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""

    def identity(self, i: int) -> str:
        """Changes when image i is another image."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Image.Image: ...


class FeatureSettings:
    """What features are, as a protocol's file says.

    Args:
        feature: `class_token` (before the final norm, the paper), `class_token_norm` (after it),
            `patch_mean` (mean of the patches after it) or `last_N` (class tokens of N blocks).
        image_size: side of the centre crop in px; None takes the backbone's own.
        batch_size: images a device and forward pass, >= 1.
        precision: `32` or `bf16` (autocast).

    Raises:
        UserError: a value is not one of these.
    """

    def __init__(
        self, *, feature: str, image_size: int | None, batch_size: int, precision: str
    ) -> None:
        check_feature(feature, None)
        if image_size is not None and image_size < 1:
            raise UserError(f"features.image_size must be >= 1, or null, got {image_size}")
        if batch_size < 1:
            raise UserError(f"features.batch_size must be >= 1, got {batch_size}")
        if image_size is not None and batch_size * image_size**2 > _MOST_PIXELS:
            raise UserError(
                f"features.image_size={image_size}: a batch of {batch_size} images would have more "
                f"than {_MOST_PIXELS:.0e} pixels; lower it or features.batch_size"
            )
        if image_size is not None and image_size > _LARGEST_SIDE:
            raise UserError(
                f"features.image_size must be at most {_LARGEST_SIDE}, got {image_size}"
            )
        if precision not in PRECISIONS:
            raise UserError(
                f"features.precision must be one of {', '.join(PRECISIONS)}, got {precision}"
            )
        self.feature, self.image_size = feature, image_size
        self.batch_size, self.precision = batch_size, precision


class Extracted(NamedTuple):
    """Features of some images."""

    rows: Tensor
    """[n, D], float32 on the CPU."""
    replaced: Tensor
    """Which images cannot be read, so that others stand in their places, bool [n]."""


class Runtime(NamedTuple):
    """Where an evaluation runs; results do not depend on it."""

    devices: tuple[torch.device, ...]
    """What this process computes on, each with a copy of the trunk; the first fits classifiers."""
    num_workers: int = 0
    """Processes that decode, for each device; 0 decodes in this one."""
    cache_dir: Path | None = None
    """Where features are kept between calls; None keeps none."""
    shared: bool = False
    """Whether all processes of the default group call together and share the extraction."""


def extract_features(
    trunk: nn.Module,
    images: LabelledSet,
    *,
    transform: Callable[[Image.Image], Tensor],
    settings: FeatureSettings,
    runtime: Runtime,
    preprocessing: Mapping[str, Any],
    title: str,
) -> Extracted:
    """Features of all images, the same on every process.

    Args:
        trunk: a `VisionTransformer`; used in eval mode and left as it was.
        images: map-style data set of RGB images.
        transform: from an image to the trunk's input, [3, S, S].
        settings: the feature, its batches and precision.
        runtime: devices, workers and cache.
        preprocessing: plain data that tells this transform from any other, for the cache's key.
        title: what the progress bar says.

    Returns:
        Rows [n, D] (D times N for `last_N`). A part with an image that cannot be read is not
        cached: the image may be there again the next time.

    Raises:
        UserError: the feature is unknown, the trunk's patch does not divide the image, or a
            feature is not finite.
    """
    check_feature(settings.feature, getattr(trunk, "depth", None))
    cache = None
    if runtime.cache_dir is not None:
        key = {
            "weights": weights_key(trunk),
            "model": getattr(trunk, "model_config", {}),
            "preprocessing": dict(preprocessing),
            "feature": settings.feature,
            "precision": settings.precision,
            "batch_size": settings.batch_size,
            "images": images_key(images.identity(i) for i in range(len(images))),
        }
        cache = FeatureCache(runtime.cache_dir, key)
    found = _Job(trunk, TransformedImages(images, transform), settings, runtime, cache, title).run()
    _check_finite(found.rows, images, title)
    return found


def less_memory(key: str, batch_size: int) -> str:
    """What takes less memory where batches of images, set by a key, go through a trunk."""
    if batch_size == 1:
        return f"{key} is 1 already; another device or a smaller backbone takes less"
    return f"{key}={batch_size // 2} takes less"


def warn_of_idle(runtime: Runtime, what: str) -> None:
    """Say so where training on images leaves all devices but the first idle."""
    if len(runtime.devices) > 1:
        log.warning(
            "%s uses one of %d devices of a process: start it with torchrun --nproc-per-node=%d",
            what,
            len(runtime.devices),
            len(runtime.devices),
        )


def check_feature(feature: str, depth: int | None) -> None:
    """Raise a UserError unless the feature is one of a trunk with that many blocks."""
    found = re.fullmatch(r"last_([1-9]\d*)", feature)
    if feature not in ("class_token", "class_token_norm", "patch_mean") and found is None:
        raise UserError(
            "feature must be class_token (before the final norm, the paper), class_token_norm, "
            f"patch_mean or last_N (N blocks), got {feature}"
        )
    if found is not None and depth is not None and int(found[1]) > depth:
        raise UserError(f"feature={feature}: this backbone has {depth} blocks")


@torch.no_grad()
def forward_feature(trunk: nn.Module, images: Tensor, feature: str) -> Tensor:
    """One kind of feature of a batch, [B, 3, S, S] -> [B, D].

    `class_token` is taken before the final norm, `class_token_norm` and `patch_mean` after it;
    `last_N` joins the class tokens of the last N blocks, oldest first, each after the final norm,
    which brings blocks of different scale together.
    """
    intermediates: Callable[[Tensor, int], list[Tensor]] = trunk.forward_intermediates  # type: ignore[assignment]
    norm: nn.Module = trunk.norm  # type: ignore[assignment]
    if feature.startswith("last_"):
        outputs = intermediates(images, int(feature.removeprefix("last_")))
        return torch.cat([norm(tokens[:, 0]) for tokens in outputs], dim=1)
    tokens = intermediates(images, 1)[0]
    if feature == "class_token":
        return tokens[:, 0]
    normed = norm(tokens)
    return normed[:, 0] if feature == "class_token_norm" else normed[:, 1:].mean(dim=1)


class TransformedImages(Dataset[tuple[Tensor, bool]]):
    """Images ready for the trunk, each with whether it replaces one that cannot be read."""

    def __init__(self, images: LabelledSet, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        image = self.images[i]
        return self.transform(image), is_replaced(image)


def is_replaced(image: Image.Image) -> bool:
    """Whether an image stands in the place of one that cannot be read."""
    return bool(image.info.get(REPLACED))


class _Job:
    """One extraction: parts are shared out over the devices of all processes.

    Batches never cross a part, so what a part holds does not depend on who computes it, nor on
    what an earlier, interrupted call had already done.
    """

    def __init__(
        self,
        trunk: nn.Module,
        images: TransformedImages,
        settings: FeatureSettings,
        runtime: Runtime,
        cache: FeatureCache | None,
        title: str,
    ) -> None:
        self.trunk, self.images, self.cache, self.title = trunk, images, cache, title
        self.settings, self.runtime = settings, runtime
        step = settings.batch_size * max(1, _PART // settings.batch_size)
        count = len(images)
        self.parts = [range(at, min(at + step, count)) for at in range(0, count, step)]
        self.rank = dist.get_rank() if runtime.shared else 0
        self.world = dist.get_world_size() if runtime.shared else 1

    def run(self) -> Extracted:
        """All rows, in order, on the CPU."""
        mine = range(self.rank, len(self.parts), self.world)
        found = {part: self._load(part) for part in mine}
        missing = [part for part, features in found.items() if features is None]
        lanes = len(self.runtime.devices)
        images = sum(len(self.parts[part]) for part in missing)
        with Progress(self.title, images, self.rank == 0) as progress:
            if lanes == 1:
                found.update(self._compute(missing, self.runtime.devices[0], progress))
            else:
                with ThreadPoolExecutor(lanes) as pool:
                    jobs = [
                        pool.submit(self._compute, missing[lane::lanes], device, progress)
                        for lane, device in enumerate(self.runtime.devices)
                    ]
                    for job in jobs:
                        found.update(job.result())
        whole = {part: features for part, features in found.items() if features is not None}
        if self.world > 1:
            gathered: list[dict[int, Extracted]] = [{} for _ in range(self.world)]
            dist.all_gather_object(gathered, whole)
            whole = {part: features for some in gathered for part, features in some.items()}
        return _joined([whole[part] for part in range(len(self.parts))])

    def _load(self, part: int) -> Extracted | None:
        rows = None if self.cache is None else self.cache.load(part, len(self.parts[part]))
        return None if rows is None else Extracted(rows, torch.zeros(len(rows), dtype=torch.bool))

    def _compute(
        self, parts: Sequence[int], device: torch.device, progress: Progress
    ) -> dict[int, Extracted]:
        """Features of some parts on one device, each kept as soon as it is whole."""
        if not parts:
            return {}
        trunk = deepcopy(self.trunk).to(device).eval()
        batches = [batch for part in parts for batch in self._batches(part)]
        loader = make_loader(
            self.images,
            batch_sampler=batches,
            num_workers=self.runtime.num_workers,
            pin_memory=device.type == "cuda",
        )
        outputs = self._forward(trunk, loader, device, progress)
        found = {}
        for part in parts:
            found[part] = _joined([next(outputs) for _ in self._batches(part)])
            if self.cache is not None and not bool(found[part].replaced.any()):
                self.cache.store(part, found[part].rows)
        return found

    def _batches(self, part: int) -> list[list[int]]:
        rows, step = self.parts[part], self.settings.batch_size
        return [list(rows[at : at + step]) for at in range(0, len(rows), step)]

    def _forward(
        self, trunk: nn.Module, loader: DataLoader, device: torch.device, progress: Progress
    ) -> Iterator[Extracted]:
        half = self.settings.precision == "bf16"
        dtype = next(trunk.parameters(), torch.empty(0)).dtype
        for batch, replaced in loader:
            with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
                moved = batch.to(device, dtype=dtype, non_blocking=True)
                features = forward_feature(trunk, moved, self.settings.feature)
            progress.advance(len(batch))
            yield Extracted(features.float().cpu(), replaced)


def _joined(parts: Sequence[Extracted]) -> Extracted:
    return Extracted(
        torch.cat([part.rows for part in parts]), torch.cat([part.replaced for part in parts])
    )


def _check_finite(features: Tensor, images: LabelledSet, title: str) -> None:
    bad = torch.nonzero(~torch.isfinite(features).all(dim=1))[:, 0].tolist()
    if bad:
        names = images.names
        raise UserError(
            f"{title}: features of {len(bad)} of {len(features)} images hold NaN or infinity "
            f"(first: {names[bad[0]]}); the backbone's weights are damaged or overflow"
        )
