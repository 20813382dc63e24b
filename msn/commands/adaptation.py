"""What `experiment=adapt` takes from the file it starts from, and which backbone it keeps.

The foundation is the backbone of `init=`; the adapted one is what the training made of it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from msn.data.dataset import LabelledImages
from msn.errors import UserError
from msn.evaluation.backbones import FrozenBackbone
from msn.evaluation.features import FeatureSettings, Runtime
from msn.evaluation.neighbours import leave_one_out
from msn.evaluation.sets import ChosenImages, labelled_features
from msn.method.optim import TRUNK_KEYS
from msn.method.vit import SIZES, VisionTransformer
from msn.weights import Weights, read_weights
from msn.weights.initialise import load_trunk
from msn.weights.weights import IMAGENET_MEAN, IMAGENET_STD

_LARGEST_SIDE = 224  # px, unless a person says otherwise: DINOv2's own 518 px cost six times more
_IMAGES_PER_PROTOTYPE = 40  # as in the recipes for digits and small images
_FEWEST_PROTOTYPES, _MOST_PROTOTYPES = 16, 1024
_NEIGHBOURS = 10
_FOUNDATION, _ADAPTED = "foundation", "adapted"
_MOST_IMAGES = 2000  # that choose between foundation and adapted


def foundation_weights(settings: dict[str, Any] | DictConfig) -> Weights:
    """The weights that `init` names.

    Raises:
        UserError: see `read_weights`.
    """
    return read_weights(
        str(settings["init"]),
        num_heads=settings["model"]["num_heads"],
        key=settings["init_key"],
        family=settings["init_family"],
    )


def follow_init(config: DictConfig) -> list[str]:
    """Give `model` the numbers of the file of `init` where they are null; others stay.

    Args:
        config: composed configuration of `train`, changed in place.

    Returns:
        Lines that say what was taken.

    Raises:
        UserError: if there is no file to take them from, or a key needs one.
    """
    _check_init(config)
    missing = [name for name in SIZES if name in config.model and config.model[name] is None]
    if not missing:
        return []
    if config.init is None:
        raise UserError(f"model.{missing[0]} is null: init=PATH gives the file's, or give a number")
    model = foundation_weights(config).model
    given = {str(key): value for key, value in config.model.items() if value is not None}
    size, patch = int(model["img_size"]), int(model["patch_size"])
    if size > _LARGEST_SIDE:
        size = _LARGEST_SIDE // patch * patch
    config.model = {**model, "img_size": size, **given}
    native = (
        "" if config.model.img_size == model["img_size"] else f", the file's {model['img_size']}"
    )
    numbers = ", ".join(f"{name} {config.model[name]}" for name in SIZES[1:])
    return [f"model of {config.init}: img_size {config.model.img_size}{native}, {numbers}"]


def _check_init(config: DictConfig) -> None:
    if config.init is not None:
        return
    method = config.method if isinstance(config.method, DictConfig) else {}
    used = [key for key, off in TRUNK_KEYS.items() if method.get(key, off) != off]
    keys = [f"method.{key}={method[key]}" for key in used]
    if config.keep_better is True:
        keys.append("keep_better=true")
    if keys:
        raise UserError(f"init=PATH must be given: {keys[0]} is for a trunk that learnt before")


def choose_prototypes(config: DictConfig, images: int) -> list[str]:
    """Give `method.num_prototypes` a number where it is null: about one for 40 images.

    Args:
        config: composed configuration of `train`, changed in place.
        images: that the training sees.

    Returns:
        Lines that say what was chosen.
    """
    method = config.method if isinstance(config.method, DictConfig) else {}
    if method.get("num_prototypes", 0) is not None:
        return []
    power = round(math.log2(max(1, images) / _IMAGES_PER_PROTOTYPE))
    chosen = min(max(2**power, _FEWEST_PROTOTYPES), _MOST_PROTOTYPES)
    config.method.num_prototypes = chosen
    return [
        f"{chosen} prototypes for {images:,} images (method.num_prototypes=N sets another number)"
    ]


def foundation_beside(
    adapted: FrozenBackbone, settings: dict[str, Any]
) -> tuple[FrozenBackbone, FrozenBackbone]:
    """The foundation as it was before the first step, and the adapted backbone, to be compared.

    Both are seen by the foundation's own kind of feature, at the size of the training.

    Args:
        adapted: as the table would see it.
        settings: of the run, resolved.

    Raises:
        UserError: if the file of `init` can no longer be read.
    """
    weights = foundation_weights(settings)
    trunk = VisionTransformer(**settings["model"])
    trunk.to(weights.trunk["cls_token"].dtype)
    load_trunk(trunk, weights)
    foundation = replace(
        adapted,
        name=_FOUNDATION,
        trunk=trunk.eval().to(next(adapted.trunk.parameters()).dtype),
        mean=tuple(weights.meta.get("mean", IMAGENET_MEAN)),
        std=tuple(weights.meta.get("std", IMAGENET_STD)),
        about={**weights.meta, "path": str(settings["init"])},
        native=weights.native,
    )
    return foundation, replace(adapted, name=_ADAPTED, native=weights.native)


def describe(kept: FrozenBackbone) -> dict[str, Any]:
    """What the exported file says of the backbone that was kept, besides what every run's says."""
    meta: dict[str, Any] = {"kept": kept.name}
    if kept.native is not None:
        meta["native"] = list(kept.native)
    if kept.name == _FOUNDATION:
        meta |= {"epoch": 0, "mean": list(kept.mean), "std": list(kept.std)}
    return meta


def better_of(
    subjects: Sequence[FrozenBackbone],
    labelled: LabelledImages | None,
    features: FeatureSettings,
    runtime: Runtime,
) -> tuple[FrozenBackbone, str]:
    """Which backbone is kept, by 10-NN on labelled training images, each left out in turn.

    The foundation stays unless the adapted one is right on more images, and by more than chance:
    by two standard errors of the difference on the same images, which is McNemar's test.

    Args:
        subjects: the foundation and the adapted one.
        labelled: training images with labels; no held-out image is looked at.
        features: of the protocol.
        runtime: devices, workers.

    Returns:
        The backbone, and a line that says why.
    """
    foundation, adapted = subjects
    if labelled is None or len(labelled) <= _NEIGHBOURS:
        return adapted, (
            "adapted (no labels among the training images to compare it by; eval_lowshot.py "
            "checkpoint=[init:PATH,adapted:RUN] compares both on a few labelled ones)"
        )
    count = min(len(labelled), _MOST_IMAGES)
    positions = torch.linspace(0, len(labelled) - 1, count, dtype=torch.float64).round().long()
    chosen = ChosenImages(labelled, positions)
    groups = (
        chosen.groups if chosen.groups is not None and len(chosen.groups.unique()) > 1 else None
    )
    hits = []
    for subject in subjects:
        rows = subject.features(chosen, features, runtime, "labelled training images")
        images = labelled_features(chosen, rows)
        hits.append(
            leave_one_out(
                images.features,
                images.labels,
                k=_NEIGHBOURS,
                num_classes=len(images.classes),
                groups=groups,
            )
        )
    before, after = hits
    # Images that one of them alone gets right; by chance as many on either side.
    margin = 2 * math.sqrt(int((before != after).sum())) / count
    shares = [float(hit.double().mean()) for hit in hits]
    kept = adapted if shares[1] - shares[0] > margin else foundation
    return kept, (
        f"{kept.name} (10-NN on {count:,} labelled training images, each left out in turn: "
        f"{foundation.name} {shares[0]:.1%}, {adapted.name} {shares[1]:.1%}; margin for chance "
        f"{100 * margin:.1f} points)"
    )
