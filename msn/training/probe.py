"""The probe: 10-NN accuracy and geometry of the backbone's features during training."""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from msn.data.datamodule import MSNDataModule
from msn.data.dataset import LabelledImages, TrainingSet
from msn.data.sampler import BatchKey
from msn.data.views import IMAGENET_MEAN, IMAGENET_STD, Views
from msn.evaluation.features import forward_feature
from msn.evaluation.neighbours import alignment, knn_predictions, rankme, uniformity
from msn.method.distributed import gathered
from msn.method.vit import VisionTransformer
from msn.schema import Range, check_ranges
from msn.training.base import PretrainingModule
from msn.training.trainer import data_of
from msn.weights.backbone import image_transform

NEIGHBOURS = 10
PAIRS = 128  # training images with two views that are compared
_BATCH = 256
_NORMALISATION = (IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Settings of the probe; the values live in `configs/callbacks/default.yaml`.

    Raises:
        UserError: a number is out of its range.
    """

    every_n_epochs: Annotated[int | None, Range(1)]  # and after the last one; None never probes
    references: Annotated[int, Range(1)]  # most labelled training images that vote
    held_out: Annotated[int, Range(1)]  # most held-out images that are classified

    def __post_init__(self) -> None:
        check_ranges("callbacks.probe", self)


class Probe(Callback):
    """Every n epochs: 10-NN on held-out labels if there are labels, else metrics without labels.

    Names: `probe/rankme`; with labels `probe/knn_top1` (a fraction), else `probe/alignment` (mean
    squared distance of two views of an image, 0 to 4) and `probe/uniformity` (log of the mean
    Gaussian potential, -8 to 0; both of arXiv 2005.10242, on unit-length features). The images are
    the same each time and stay on the device. A run that starts from weights is also measured
    before its first step.

    Args:
        settings: those of `ProbeSettings`, by keyword.

    Attributes:
        latest: the last logged metrics.
        latest_epoch: their epoch, 0-based; -1 before the first one.
        start: the metrics before the first step, if the run started from weights.
    """

    Settings = ProbeSettings

    def __init__(self, **settings: Any) -> None:
        self.settings = ProbeSettings(**settings)
        self.latest: dict[str, float] = {}
        self.start: dict[str, float] = {}
        self.latest_epoch = -1
        self._images: _Labelled | _Pairs | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the weights that a run starts from, unless they are random."""
        assert isinstance(pl_module, PretrainingModule)
        begun = trainer.global_step > 0 or pl_module.checkpoint_info.get("init") is None
        if begun or self.settings.every_n_epochs is None:
            return
        self._measure(trainer, pl_module, epoch=-1)
        self.start = self.latest
        if trainer.is_global_zero:
            told = [f"effective rank {self.start['probe/rankme']:.1f}"]
            if "probe/knn_top1" in self.start:
                told.append(f"10-NN {self.start['probe/knn_top1']:.1%}")
            print(f"before the first step  {', '.join(told)}", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        epoch, interval = trainer.current_epoch + 1, self.settings.every_n_epochs
        if interval is None or epoch % interval and epoch != trainer.max_epochs:
            return
        assert isinstance(pl_module, PretrainingModule)
        self._measure(trainer, pl_module, epoch=trainer.current_epoch)

    @property
    def num_held_out(self) -> int:
        """Images that are classified."""
        return len(self._images.held_out.labels) if isinstance(self._images, _Labelled) else 0

    def state_dict(self) -> dict[str, Any]:
        """The metrics before the first step."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.start = state_dict["start"]

    def _measure(self, trainer: Trainer, module: PretrainingModule, *, epoch: int) -> None:
        if self._images is None:
            self._images = self._choose(data_of(trainer), module)
        trunk = module.network.backbone
        # All processes probe: a sharded trunk needs each of them.
        with (
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            gathered(module.network, trunk),
        ):
            self.latest = self._images.figures(trunk)
        self.latest_epoch = epoch
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": max(0, epoch), **self.latest}, step=trainer.global_step)

    def _choose(self, data: MSNDataModule, module: PretrainingModule) -> "_Labelled | _Pairs":
        labelled = data.labelled_sets()
        if labelled is None:
            return _draw_pairs(data, module.device)
        size = module.network.backbone.img_size
        wanted = (self.settings.references, self.settings.held_out)
        references, held_out = (
            _draw(images, most, size, module.device)
            for images, most in zip(labelled, wanted, strict=True)
        )
        return _Labelled(references, held_out, len(labelled[0].classes))


class _Images(NamedTuple):
    pixels: Tensor  # uint8, [n, 3, S, S]
    labels: Tensor  # [n]


class _Labelled(NamedTuple):
    references: _Images
    held_out: _Images
    num_classes: int

    def figures(self, trunk: VisionTransformer) -> dict[str, float]:
        voters, held_out = (
            _features(trunk, images.pixels) for images in (self.references, self.held_out)
        )
        predicted = knn_predictions(
            voters,
            self.references.labels,
            held_out,
            neighbours=[min(NEIGHBOURS, len(voters))],
            temperature=None,
            num_classes=self.num_classes,
        )
        top1 = (predicted[0] == self.held_out.labels).double().mean()
        return {"probe/knn_top1": float(top1), "probe/rankme": rankme(held_out.cpu())}


class _Pairs(NamedTuple):
    first: Tensor  # a view of each image, normalised, [n, 3, S, S]
    second: Tensor  # another view of the same images

    def figures(self, trunk: VisionTransformer) -> dict[str, float]:
        first, second = (_features(trunk, views) for views in self)
        return {
            "probe/rankme": rankme(first.cpu()),
            "probe/alignment": float(alignment(first, second)),
            "probe/uniformity": float(uniformity(first)),
        }


def _draw(images: LabelledImages, most: int, size: int, device: torch.device) -> _Images:
    """At most so many images, evenly spaced in the list, which may be sorted by class."""
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(np.int64)
    as_pixels = image_transform(size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    rows = [(as_pixels(images[int(i)]) * 255).round().to(torch.uint8) for i in chosen]
    return _Images(torch.stack(rows).to(device), images.labels[chosen].to(device))


def _draw_pairs(data: MSNDataModule, device: torch.device) -> _Pairs:
    """Target view of some training images, and an anchor view or a target view of another epoch."""
    images = TrainingSet(
        data.pools.train, data.views, seed=data.seed, reduce=not data.use_reference
    )
    chosen = np.linspace(0, len(images) - 1, min(PAIRS, len(images))).round().astype(np.int64)

    def views_of(epoch: int) -> Views:
        batch = images[BatchKey(epoch, 0, chosen)]
        return data.make_views(data.transfer_batch_to_device(batch, device, 0))

    views = views_of(0)
    anchors = views.rand if len(views.rand) else views.focal
    return _Pairs(views.target, anchors[0] if len(anchors) else views_of(1).target)


def _features(trunk: VisionTransformer, images: Tensor) -> Tensor:
    """Class tokens before the final norm (paper A.2), float32 [n, D]."""
    rows = []
    for part in images.split(_BATCH):
        if part.dtype == torch.uint8:
            mean, std = (part.new_tensor(v, dtype=torch.float32) for v in _NORMALISATION)
            part = (part / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        rows.append(forward_feature(trunk, part.to(trunk.cls_token.dtype), "class_token").float())
    return torch.cat(rows)
