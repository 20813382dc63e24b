"""Subjects of an evaluation: pretrained backbones, a random network, raw pixels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from msn.errors import UserError
from msn.evaluation.features import (
    Extracted,
    FeatureSettings,
    LabelledSet,
    NoNetwork,
    Runtime,
    check_feature,
    extract_features,
    own_feature,
)
from msn.method.vit import VisionTransformer
from msn.weights import ForeignBackbone, build_trunk, open_backbone_of
from msn.weights.backbone import image_transform, trimmed
from msn.weights.families import NATIVE, PAPER, Native
from msn.weights.hub import PREFIX
from msn.weights.weights import BASELINES, IMAGENET_MEAN, IMAGENET_STD, say_notes


@dataclass(frozen=True)
class FrozenBackbone:
    """A backbone with its preprocessing.

    Args:
        name: of the backbone in tables.
        trunk: the network, ours or one of timm or transformers.
        image_size: side of the centre crop in px; the trunk's patch divides it.
        mean: of the normalisation, of each channel.
        std: likewise.
        about: what its file says about it (epoch, licence, ...), for the results.
        is_baseline: True for a baseline, with which others are compared.
        native: feature of its family; None if unknown.
    """

    name: str
    trunk: VisionTransformer | ForeignBackbone
    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    about: dict[str, Any] = field(default_factory=dict)
    is_baseline: bool = False
    native: Native | None = PAPER

    def __post_init__(self) -> None:
        if isinstance(self.trunk, ForeignBackbone):
            return  # `check` asks its library which sizes it takes
        if self.image_size < 1 or self.image_size % self.trunk.patch_size:
            raise UserError(
                f"image_size={self.image_size}: must be a multiple of {self.trunk.patch_size}, "
                f"the patch of {self.name}"
            )

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Short side as `short_side` says, centre crop, normalise (paper A.2); or its library's."""
        return self.transform_of("centre")

    def transform_of(self, crop: str) -> Callable[[Image.Image], Tensor]:
        """The same with another crop, one of `features.CROPS`."""
        if isinstance(self.trunk, ForeignBackbone):
            return self.trunk.transform
        whole = crop == "whole"
        return image_transform(self.image_size, mean=self.mean, std=self.std, whole=whole)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What identifies its transform, plain data."""
        if isinstance(self.trunk, ForeignBackbone):
            return dict(self.trunk.card.preprocessing)
        return {"image_size": self.image_size, "mean": list(self.mean), "std": list(self.std)}

    def features(
        self, images: LabelledSet, settings: FeatureSettings, runtime: Runtime, title: str
    ) -> Extracted:
        """Features of all images, float32 [n, D]."""
        return extract_features(
            self.trunk,
            images,
            transform=self.transform_of(settings.crop),
            settings=replace(settings, feature=self.kind(settings)),
            runtime=runtime,
            preprocessing=self.preprocessing | _cropped(settings),
            title=f"{self.name}: {title}",
        )

    def kind(self, settings: FeatureSettings) -> str:
        """Kind of the features, for rows and heads.

        Raises:
            UserError: if the family's own feature is wanted but unknown.
        """
        if isinstance(self.trunk, ForeignBackbone):
            return self.trunk.resolve(settings.feature)
        feature = settings.feature
        if feature == NATIVE and self.native is not None:
            feature = self.native.feature
        return own_feature(self.about, feature)

    def check(self, settings: FeatureSettings) -> None:
        """Refuse, before any work, a feature that this backbone does not have.

        Raises:
            UserError: names the features that it has.
        """
        kind = self.kind(settings)
        if isinstance(self.trunk, ForeignBackbone):
            if settings.crop != "centre":
                raise UserError(
                    f"features.crop={settings.crop}: {self.name} has its library's own "
                    "preprocessing; it must be centre"
                )
            self.trunk.check(kind)
        else:
            check_feature(kind, self.trunk.depth)


@dataclass(frozen=True)
class RawPixels:
    """A baseline without network: the pixels of the centre crop.

    Args:
        name: in tables.
        size: side in px of the resized crop.
    """

    name: str
    size: int

    def features(
        self, images: LabelledSet, settings: FeatureSettings, runtime: Runtime, title: str
    ) -> Extracted:
        """Pixels of all images, float32 [n, 3 * size * size]."""
        plain = FeatureSettings(
            feature="class_token", image_size=None, batch_size=settings.batch_size, precision="32"
        )
        cpu = torch.device("cpu")  # nothing to compute, but images to decode
        return extract_features(
            NoNetwork(),
            images,
            transform=pixel_transform(self.size, whole=settings.crop == "whole"),
            settings=plain,
            runtime=runtime._replace(devices=(cpu,) * len(runtime.devices)),
            preprocessing={"pixels": self.size} | _cropped(settings),
            title=f"{self.name}: {title}",
        )

    def kind(self, settings: FeatureSettings) -> str:
        """Kind of the features, for rows and heads."""
        return "pixels"


def _cropped(settings: FeatureSettings) -> dict[str, Any]:
    """The crop for a cache's key; empty for the centre crop, so that older caches stay valid."""
    return {} if settings.crop == "centre" else {"crop": settings.crop}


Subject = FrozenBackbone | RawPixels
"""A backbone or baseline: it turns images into features."""


def random_backbone(like: FrozenBackbone, *, seed: int, name: str = "random") -> FrozenBackbone:
    """A backbone of the same architecture with random weights, drawn from a seed."""
    trunk: VisionTransformer | ForeignBackbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(like.trunk, ForeignBackbone):
            trunk = like.trunk.fresh()
        else:
            numbers: dict[str, Any] = {**like.trunk.model_config}
            trunk = VisionTransformer(**numbers)
    return replace(like, name=name, trunk=trunk.eval(), about={}, is_baseline=True)


def open_backbones(
    checkpoint: str | Sequence[str],
    *,
    image_size: int | None,
    num_heads: int | None,
    key: str | Mapping[str, str] | None = None,
    family: str | Mapping[str, str] | None = None,
) -> list[FrozenBackbone]:
    """Open every backbone that the user named.

    Args:
        checkpoint: a path, or several `name:path`; a path is anything that `open_backbone_of`
            takes. A single nameless path is called `msn`.
        image_size: side of the crop in px; None takes each backbone's own.
        num_heads: of every backbone whose file does not say; a warning tells what is assumed.
        key: which of several trunks (see `read_weights`), for all files or by name of the backbone.
        family: likewise the family, where names and shapes fit several.

    Raises:
        UserError: two names are equal, a path cannot be read, or a size does not fit; or no file
            has that number of heads.
    """
    entries = [checkpoint] if isinstance(checkpoint, str) else list(checkpoint)
    if not entries:
        raise UserError("checkpoint=[]: give a path, or [name:path,name:path]")
    named = [_name_and_path(str(entry), alone=len(entries) == 1) for entry in entries]
    names = [name for name, _ in named]
    twice = sorted(
        {name for name in names if names.count(name) > 1} | (set(BASELINES) & set(names))
    )
    if twice:
        raise UserError(
            f"checkpoint: the name {twice[0]} is taken; write name:path with another name"
        )
    chosen: list[Mapping[str, Any]] = []
    for setting, value in (("init_key", key), ("init_family", family)):
        chosen.append(value if isinstance(value, Mapping) else dict.fromkeys(names, value))
        if unknown := sorted(set(chosen[-1]) - set(names)):
            raise UserError(f"{setting}: no backbone is called {', '.join(map(str, unknown))}")
    keys, families = chosen
    opened = [
        open_backbone(
            name,
            path,
            image_size=image_size,
            num_heads=num_heads,
            key=keys.get(name),
            family=families.get(name),
        )
        for name, path in named
    ]
    found = sorted({one.trunk.num_heads for one in opened if one.trunk.num_heads is not None})
    if num_heads is not None and num_heads not in found:
        raise UserError(
            f"model.num_heads={num_heads}: checkpoint itself says "
            f"{' and '.join(map(str, found)) or 'its'} attention heads; leave the key out"
        )
    return opened


def open_backbone(
    name: str,
    path: str,
    *,
    image_size: int | None,
    num_heads: int | None,
    key: str | None = None,
    family: str | None = None,
) -> FrozenBackbone:
    """Open one backbone, see `open_backbones`."""
    found = open_backbone_of(
        path, num_heads=num_heads, key=key, family=family, image_size=image_size
    )
    if isinstance(found, ForeignBackbone):
        about = {"path": path, **found.meta, "library": found.card.library}
        mean, std = found.card.mean, found.card.std
        return FrozenBackbone(name, found, found.img_size, mean, std, about, native=found.native)
    say_notes(found, path)
    trunk = build_trunk(found).float()
    method = "mae" if found.meta.get("kind") == "mae" else "msn"
    return FrozenBackbone(
        name,
        trunk,
        trunk.img_size if image_size is None else image_size,
        tuple(found.meta.get("mean", IMAGENET_MEAN)),
        tuple(found.meta.get("std", IMAGENET_STD)),
        {**found.meta, "path": path, "kind": found.source, "pretrained_by": method},
        native=found.native,
    )


def _name_and_path(entry: str, *, alone: bool) -> tuple[str, str]:
    """Split `name:path`; a path that exists as it stands is not split."""
    name, colon, path = entry.partition(":")
    if Path(entry).exists() or not colon or "/" in name or entry.startswith(PREFIX):
        return ("msn" if alone else Path(entry).stem), entry
    if not name or not path:
        raise UserError(f"checkpoint={entry}: write name:path")
    return name, path


# Largest side in px of raw pixels; more take much memory and do not classify better.
LARGEST_SIDE = 32


def pixel_transform(size: int, *, whole: bool = False) -> Callable[[Image.Image], Tensor]:
    """From an RGB image to the pixels of its centre crop, in [0, 1], float32 [3 * size * size].

    Args:
        size: side in px to which the shorter side is resized, >= 1.
        whole: resize the whole image to the square instead of cropping.
    """
    return partial(_pixels, size=size, whole=whole)


def _pixels(image: Image.Image, size: int, whole: bool) -> Tensor:
    if whole:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    image = trimmed(image)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    cropped = resized.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8).float() / 255
