"""What is evaluated: a pretrained trunk, a randomly initialised one, or raw pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor

from msn.errors import UserError
from msn.evaluation.features import (
    Extracted,
    FeatureSettings,
    LabelledSet,
    Runtime,
    extract_features,
)
from msn.evaluation.pixels import NoNetwork, pixel_transform
from msn.method.vit import VisionTransformer
from msn.weights import build_trunk, read_weights
from msn.weights.preprocessing import image_transform
from msn.weights.weights import BASELINES, IMAGENET_MEAN, IMAGENET_STD, say_assumed_heads

_TIMM = "timm/"


class Subject(Protocol):
    """Something that turns images into features."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def features(
        self, images: LabelledSet, settings: FeatureSettings, runtime: Runtime, title: str
    ) -> Extracted:
        """Features of all images, float32 [n, D]."""

    def kind(self, settings: FeatureSettings) -> str:
        """What the features are, for rows and heads."""


@dataclass(frozen=True)
class FrozenBackbone:
    """A trunk with the preprocessing it was made for.

    Args:
        name: what tables call it.
        trunk: the network.
        image_size: side of the centre crop in px; the trunk's patch divides it.
        mean: of the normalisation, of each channel.
        std: likewise.
        about: what its file says of it (epoch, licence, ...), for the results.
        is_baseline: whether it is nobody's, for comparison alone.
    """

    name: str
    trunk: VisionTransformer
    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    about: dict[str, Any] = field(default_factory=dict)
    is_baseline: bool = False

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.image_size % self.trunk.patch_size:
            raise UserError(
                f"image_size={self.image_size}: must be a multiple of {self.trunk.patch_size}, "
                f"the patch of {self.name}"
            )

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Short side as `short_side` says, centre crop, normalise (paper A.2)."""
        return image_transform(self.image_size, mean=self.mean, std=self.std)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What tells its transform from others, plain data."""
        return {"image_size": self.image_size, "mean": list(self.mean), "std": list(self.std)}

    def features(
        self, images: LabelledSet, settings: FeatureSettings, runtime: Runtime, title: str
    ) -> Extracted:
        """Features of all images, float32 [n, D]."""
        return extract_features(
            self.trunk,
            images,
            transform=self.transform,
            settings=settings,
            runtime=runtime,
            preprocessing=self.preprocessing,
            title=f"{self.name}: {title}",
        )

    def kind(self, settings: FeatureSettings) -> str:
        """What the features are, for rows and heads."""
        return settings.feature


@dataclass(frozen=True)
class RawPixels:
    """No network at all: the pixels of the centre crop.

    Args:
        name: what tables call it.
        size: side in px to which images are brought.
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
        cpu = torch.device("cpu")  # there is nothing to compute, but much to decode
        return extract_features(
            NoNetwork(),
            images,
            transform=pixel_transform(self.size),
            settings=plain,
            runtime=runtime._replace(devices=(cpu,) * len(runtime.devices)),
            preprocessing={"pixels": self.size},
            title=f"{self.name}: {title}",
        )

    def kind(self, settings: FeatureSettings) -> str:
        """What the features are, for rows and heads."""
        return "pixels"


def random_backbone(like: FrozenBackbone, *, seed: int, name: str = "random") -> FrozenBackbone:
    """A backbone of the same architecture as it was before training, drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = VisionTransformer(**like.trunk.model_config)  # type: ignore[arg-type]
    size, mean, std = like.image_size, like.mean, like.std
    return FrozenBackbone(name, trunk.eval(), size, mean, std, is_baseline=True)


def open_backbones(
    checkpoint: str | Sequence[str], *, image_size: int | None, num_heads: int | None
) -> list[FrozenBackbone]:
    """Open every backbone that a person named.

    Args:
        checkpoint: a path, or several `name:path`. A path is anything that `read_weights` takes, or
            `timm/MODEL@FILE` for a ViT of timm by name with a local file. A single nameless path is
            called `msn`.
        image_size: side of the crop in px; None takes each backbone's own.
        num_heads: of every backbone whose file cannot tell; default width // 64, with a warning.

    Raises:
        UserError: two names are the same, a path cannot be read, or a size does not fit.
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
    return [
        open_backbone(name, path, image_size=image_size, num_heads=num_heads)
        for name, path in named
    ]


def open_backbone(
    name: str, path: str, *, image_size: int | None, num_heads: int | None
) -> FrozenBackbone:
    """Open one backbone, see `open_backbones`."""
    told: dict[str, Any] = {}
    if path.startswith(_TIMM):
        model, at, path = path.removeprefix(_TIMM).partition("@")
        if not at or not path:
            raise UserError(f"checkpoint={_TIMM}{model}: write {_TIMM}MODEL@FILE")
        told = _told_by_timm(model)
        num_heads = told.pop("num_heads")
    weights = read_weights(path, num_heads=num_heads)
    say_assumed_heads(weights, path)
    trunk = build_trunk(weights).float()
    about = {**told, **weights.meta}
    return FrozenBackbone(
        name,
        trunk,
        trunk.img_size if image_size is None else image_size,
        tuple(about.get("mean", IMAGENET_MEAN)),
        tuple(about.get("std", IMAGENET_STD)),
        {"path": path, "kind": weights.source, **weights.meta},
    )


def _name_and_path(entry: str, *, alone: bool) -> tuple[str, str]:
    """Split `name:path`; a path that exists as it stands is not split."""
    name, colon, path = entry.partition(":")
    if Path(entry).exists() or not colon or "/" in name:
        return ("msn" if alone else Path(entry).stem), entry
    if not name or not path:
        raise UserError(f"checkpoint={entry}: write name:path")
    return name, path


def _told_by_timm(model: str) -> dict[str, Any]:
    if not timm.is_model(model):
        near = timm.list_models(f"*{model.split('.')[0][:12]}*")[:5]
        hint = f"; similar are {', '.join(near)}" if near else ""
        raise UserError(
            f"checkpoint={_TIMM}{model}: timm {timm.__version__} has no such model{hint}"
        )
    with torch.device("meta"):
        built = timm.create_model(model, pretrained=False)
    if not isinstance(built, TimmVisionTransformer):
        raise UserError(f"checkpoint={_TIMM}{model}: is not a plain vision transformer")
    attention = built.blocks[0].get_submodule("attn")
    config = timm.models.get_pretrained_cfg(model)
    normalisation = {} if config is None else {"mean": config.mean, "std": config.std}
    return {"num_heads": int(attention.num_heads), **normalisation}  # type: ignore[arg-type]
