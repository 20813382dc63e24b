"""Extract features of a frozen backbone on all devices and processes, and cache them.

The paper's feature is the class token of the target trunk's last block *before* the final norm
(A.2), from one centre crop.
"""

import hashlib
import json
import logging
import math
import os
import re
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from msn.data.dataset import REPLACED
from msn.data.workers import make_loader
from msn.errors import UserError
from msn.evaluation.logistic import matmul_precision
from msn.files import utf8_path
from msn.method.vit import VisionTransformer
from msn.progress import Progress
from msn.schema import Range, check_ranges
from msn.weights.families import NATIVE, POOLED
from msn.weights.foreign import ForeignBackbone
from msn.weights.tensors import save_tensors
from msn.weights.weights import trunk_digest

log = logging.getLogger(__name__)

_FORMAT = 2  # of the cache


class FeatureCache:
    """Parts of one feature matrix under a key of everything that made it.

    Args:
        directory: of all caches; one folder per key is made in it.
        key: plain data that determines the features: weights, preprocessing, file list.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any]) -> None:
        text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.directory = directory / self.digest[:32]

    def load(self, part: int, rows: int) -> Tensor | None:
        """Read a part of `rows` rows; None if it is missing, truncated, altered or not ours."""
        path = self._path(part)
        if not path.is_file():
            return None
        try:
            with utf8_path(path) as place, safe_open(place, framework="pt") as file:
                metadata = file.metadata() or {}
                features = file.get_tensor("features")
        except (SafetensorError, OSError) as error:
            log.warning("feature cache: %s is damaged; recomputing (%s)", path, error)
            return None
        whole = (
            metadata.get("key") == self.digest
            and features.shape[0] == rows
            and metadata.get("sha256") == digest_of(features)
        )
        if not whole:
            log.warning("feature cache: %s is not what was written; recomputing", path)
            return None
        return features

    def store(self, part: int, features: Tensor) -> None:
        """Write a part completely; a warning says if it cannot be written."""
        metadata = {"key": self.digest, "sha256": digest_of(features)}
        try:
            save_tensors(self._path(part), {"features": features}, metadata)
        except UserError as error:
            log.warning("feature cache: cannot write below %s (%s)", self.directory, error)

    def _path(self, part: int) -> Path:
        return self.directory / f"part-{part:05d}.safetensors"


def weights_key(module: nn.Module) -> str:
    """Digest of every parameter and buffer with its name."""
    return trunk_digest(module.state_dict())


def images_key(identities: Iterable[str]) -> str:
    """Digest of a list of images, in order."""
    digest = hashlib.sha256()
    for identity in identities:
        digest.update(os.fsencode(identity) + b"\0")
    return digest.hexdigest()


def digest_of(tensor: Tensor) -> str:
    """Digest of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


PRECISIONS = ("32", "tf32", "bf16")
CROPS = ("centre", "whole")
TOKENS = "tokens"  # the class token beside every patch token
FEATURES = (
    *(NATIVE, "class_token", "class_token_norm", "patch_mean", "patch_mean_norm", TOKENS),
    POOLED,
)
PATCHES = "patches"  # every patch token after the norm, for protocol=attentive alone
# Images per part: the most that an interrupted extraction loses per device.
_PART = 4096
# Per batch; with three channels in float32, 24 GB.
_MOST_PIXELS = 2e9
_LARGEST_SIDE = 8192  # px; Pillow refuses crops of more than 13,377 as an attack


class LabelledSet(typing.Protocol):
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

    @property
    def groups(self) -> Tensor | None:
        """Numbers of groups whose images belong together, [n]; None without groups."""

    def identity(self, i: int) -> str:
        """A key that changes with the content of image i."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """How features are extracted; the values are in `configs/protocol/base.yaml`.

    Raises:
        UserError: a value is outside its range.
    """

    # `native` (that of the backbone's family, see `msn.weights.families`), `class_token` (before
    # the final norm, as in the paper), `class_token_norm` (after it), `patch_mean` (mean of the
    # patches after it), `patch_mean_norm` (their mean, then the norm, as fine-tuned MAE), `last_N`
    # (class tokens of the last N blocks), `last_N_mean` (these and `patch_mean`), `tokens` (the
    # class token beside every patch token) or `pooled` (as timm or transformers pool for a
    # classifier; not for our own trunk).
    feature: str
    # Side of the centre crop in px; None takes the backbone's own.
    image_size: Annotated[int | None, Range(1, _LARGEST_SIDE)]
    batch_size: Annotated[int, Range(1)]  # images per device and forward pass
    # One of PRECISIONS: tf32 rounds the factors of float32 products to 10 bits (CUDA only), bf16 is
    # autocast.
    precision: str
    # `centre`, or `whole`: the whole image is squashed into the square.
    crop: str = "centre"

    def __post_init__(self) -> None:
        check_feature(self.feature, None)
        check_ranges("features", self)
        if self.batch_size * (self.image_size or 1) ** 2 > _MOST_PIXELS:
            size = "" if self.image_size is None else f"features.image_size={self.image_size}: "
            raise UserError(
                f"{size}a batch of {self.batch_size} images would have more than "
                f"{_MOST_PIXELS:.0e} pixels; lower features.batch_size"
            )
        if self.crop not in CROPS:
            raise UserError(f"features.crop must be one of {', '.join(CROPS)}, got {self.crop}")
        if self.precision not in PRECISIONS:
            raise UserError(
                f"features.precision must be one of {', '.join(PRECISIONS)}, got {self.precision}"
            )


class Extracted(NamedTuple):
    """Features of some images."""

    rows: Tensor
    """[n, D], float32 on the CPU."""
    replaced: Tensor
    """Which images cannot be read and are replaced by others, bool [n]."""


class Runtime(NamedTuple):
    """Where an evaluation runs; results do not depend on it."""

    devices: tuple[torch.device, ...]
    """Devices of this process, each with a copy of the trunk; the first fits classifiers."""
    num_workers: int = 0
    """Processes that decode, per device; 0 decodes in this one."""
    cache_dir: Path | None = None
    """Where features are kept between calls; None keeps none."""
    shared: bool = False
    """Whether all processes of the default group make the same calls and share the work."""

    @property
    def rank(self) -> int:
        """Number of this process among those that share the work."""
        return dist.get_rank() if self.shared else 0

    @property
    def world(self) -> int:
        """Number of processes that share the work."""
        return dist.get_world_size() if self.shared else 1


class NoNetwork(nn.Module):
    """A trunk that returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def forward_intermediates(self, rows: Tensor, last: int) -> list[Tensor]:
        """Rows [B, D] as the one token of each image, [B, 1, D]."""
        return [rows.unsqueeze(1)]


Trunk = VisionTransformer | ForeignBackbone | NoNetwork


def extract_features(
    trunk: Trunk,
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
        trunk: used in eval mode and left as it was.
        images: map-style data set of RGB images.
        transform: from an image to the trunk's input, [3, S, S].
        settings: feature, batch size and precision.
        runtime: devices, workers and cache.
        preprocessing: plain data that identifies the transform in the cache's key.
        title: of the progress bar.

    Returns:
        Rows [n, D] (D times N for `last_N`). A part with an image that cannot be read is not
        cached: the image may be readable the next time.

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


def check_feature(feature: str, depth: int | None) -> None:
    """Raise a UserError unless a trunk with that many blocks has the feature."""
    found = re.fullmatch(r"last_([1-9]\d*)(_mean)?", feature)
    if feature not in (*FEATURES, PATCHES) and found is None:
        raise UserError(
            f"feature must be {', '.join(FEATURES)} or last_N (N blocks), got {feature}"
        )
    if found is not None and depth is not None and int(found[1]) > depth:
        raise UserError(f"feature={feature}: this backbone has {depth} blocks")


def own_feature(meta: Mapping[str, Any], feature: str) -> str:
    """The feature that replaces the class token of a backbone trained to average its patches."""
    averages = meta.get("pool") == "mean" and feature in ("class_token", "class_token_norm")
    return "patch_mean_norm" if averages else feature


@torch.no_grad()
def forward_feature(trunk: Trunk, images: Tensor, feature: str) -> Tensor:
    """One kind of feature of a batch, [B, 3, S, S] -> [B, D]; the kinds are in `FeatureSettings`.

    `last_N` joins the class tokens of the last N blocks, oldest first, each after the final norm,
    which brings them to one scale. `patches` are all patch tokens after the norm, [B, T * D];
    `tokens` puts `class_token` times sqrt(T) before them, so that it weighs as much as all of them,
    [B, (1 + T) * D].
    """
    if isinstance(trunk, ForeignBackbone):
        return trunk.feature(images, feature)
    if feature == POOLED:
        raise UserError(
            "feature=pooled is for backbones of timm and transformers; a plain vision transformer "
            "has class_token, class_token_norm, patch_mean and last_N"
        )
    if feature.startswith("last_"):
        outputs = trunk.forward_intermediates(images, int(feature.split("_")[1]))
        parts = [trunk.norm(tokens[:, 0]) for tokens in outputs]
        if feature.endswith("_mean"):
            parts.append(trunk.norm(outputs[-1])[:, trunk.num_prefix_tokens :].mean(dim=1))
        return torch.cat(parts, dim=1)
    tokens = trunk.forward_intermediates(images, 1)[0]
    if feature == "class_token":
        return tokens[:, 0]
    if feature == "patch_mean_norm":
        return trunk.norm(tokens[:, trunk.num_prefix_tokens :].mean(dim=1))
    normed = trunk.norm(tokens)
    if feature in (PATCHES, TOKENS):
        patches = normed[:, trunk.num_prefix_tokens :]
        class_token = tokens[:, 0] * math.sqrt(patches.shape[1])
        flat = patches.flatten(1)
        return flat if feature == PATCHES else torch.cat([class_token, flat], dim=1)
    return (
        normed[:, 0]
        if feature == "class_token_norm"
        else normed[:, trunk.num_prefix_tokens :].mean(dim=1)
    )


class TransformedImages(Dataset[tuple[Tensor, bool]]):
    """Transformed images, each with whether it replaces one that cannot be read."""

    def __init__(self, images: LabelledSet, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        image = self.images[i]
        return self.transform(image), is_replaced(image)


def is_replaced(image: Image.Image) -> bool:
    """Whether an image replaces one that cannot be read."""
    return bool(image.info.get(REPLACED))


class _Job:
    """One extraction, whose parts are distributed over the devices of all processes.

    Batches never cross a part, so a part does not depend on who computes it, nor on what an
    earlier, interrupted call has done.
    """

    def __init__(
        self,
        trunk: Trunk,
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

    def run(self) -> Extracted:
        """All rows, in order, on the CPU."""
        mine = range(self.runtime.rank, len(self.parts), self.runtime.world)
        found = {part: self._load(part) for part in mine}
        missing = [part for part, features in found.items() if features is None]
        lanes = len(self.runtime.devices)
        images = sum(len(self.parts[part]) for part in missing)
        precision, device = self.settings.precision, self.runtime.devices[0]
        # On a CPU other precisions than float32 are slower; elsewhere the title shows the choice.
        told = self.title if device.type == "cpu" else f"{self.title}, precision={precision}"
        products = float32_products(precision, device)
        with products, Progress(told, images, self.runtime.rank == 0) as progress:
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
        if self.runtime.world > 1:
            gathered: list[dict[int, Extracted]] = [{} for _ in range(self.runtime.world)]
            dist.all_gather_object(gathered, whole)
            whole = {part: features for some in gathered for part, features in some.items()}
        return _joined([whole[part] for part in range(len(self.parts))])

    def _load(self, part: int) -> Extracted | None:
        rows = None if self.cache is None else self.cache.load(part, len(self.parts[part]))
        return None if rows is None else Extracted(rows, torch.zeros(len(rows), dtype=torch.bool))

    def _compute(
        self, parts: Sequence[int], device: torch.device, progress: Progress
    ) -> dict[int, Extracted]:
        """Features of some parts on one device, each cached as soon as it is complete."""
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
        self, trunk: Trunk, loader: DataLoader, device: torch.device, progress: Progress
    ) -> Iterator[Extracted]:
        half, lag = self.settings.precision == "bf16", int(device.type == "cuda")
        dtype = next(trunk.parameters(), torch.empty(0)).dtype
        under_way: deque[_OnItsWay] = deque()
        for batch, replaced in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                moved = batch.to(device, dtype=dtype, non_blocking=True)
                features = forward_feature(trunk, moved, self.settings.feature)
            under_way.append(_OnItsWay(features.float(), replaced))
            progress.advance(len(batch))
            while len(under_way) > lag:
                yield under_way.popleft().arrived()
        while under_way:
            yield under_way.popleft().arrived()


class _OnItsWay:
    """Features of a batch that are copied to the host while the next batch is computed."""

    def __init__(self, features: Tensor, replaced: Tensor) -> None:
        self.replaced, self.copied = replaced, None
        if not features.is_cuda:
            self.rows = features.cpu()
            return
        self.rows = torch.empty_like(features, device="cpu", pin_memory=True)
        self.rows.copy_(features, non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record(torch.cuda.current_stream(features.device))

    def arrived(self) -> Extracted:
        """Wait for the copy."""
        if self.copied is not None:
            self.copied.synchronize()
        return Extracted(self.rows, self.replaced)


def float32_products(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Within, all threads take float32 products as one of PRECISIONS says.

    Raises:
        UserError: tf32 on a device other than CUDA.
    """
    if precision != "tf32":
        return nullcontext()
    if device.type != "cuda":
        raise UserError(f"features.precision=tf32 is for CUDA, not for {device.type}; 32 or bf16")
    return matmul_precision("high")


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
