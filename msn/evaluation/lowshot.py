"""The low-shot table: k labels a class over seeded nested splits, and kNN with all labels."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msn.data.dataset import LabelledImages
from msn.data.subsets import k_shot
from msn.data.transforms import evaluation_transform
from msn.errors import UserError
from msn.evaluation.features import check_feature, extract_features, pixel_features
from msn.evaluation.logistic import centre_and_normalise, fit_logistic
from msn.method.geometry import majority_votes, nearest
from msn.method.vit import VisionTransformer

PIXELS = "pixels"


class LabelledFeatures(NamedTuple):
    """Features of the images that may be labelled and of those that test."""

    train: Tensor
    """[n, D]."""
    train_labels: Tensor
    held_out: Tensor
    """[m, D]."""
    held_out_labels: Tensor
    classes: Sequence[str]


class KShot:
    """k labelled images a class: logistic regression on frozen features; and kNN with all labels.

    Args:
        shots: numbers of labelled images a class, each >= 1.
        splits: seeded draws of the labelled images, >= 1; the labelled images of a smaller k are
            among those of a larger one.
        lambd: the paper's regularisation: lambda of the objective times the labelled images, > 0.
        knn_neighbours: k of the kNN row (cosine, majority), >= 1.
        feature: see `msn.evaluation.features.extract_features`.
        batch_size: images a forward pass.
        tolerance: certified relative gap to the optimum of logistic regression, > 0.
        max_evaluations: passes over the rows after which the solver gives up with a warning.

    Raises:
        UserError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        shots: Sequence[int],
        splits: int,
        lambd: float,
        knn_neighbours: int,
        feature: str,
        batch_size: int,
        tolerance: float,
        max_evaluations: int,
    ) -> None:
        check_feature(feature)
        for name, value in {
            "splits": splits,
            "knn_neighbours": knn_neighbours,
            "batch_size": batch_size,
        }.items():
            if value < 1:
                raise UserError(f"protocol.{name} must be >= 1, got {value}")
        if not shots or min(shots) < 1:
            raise UserError(f"protocol.shots must be numbers >= 1, got {list(shots)}")
        if not lambd > 0:
            raise UserError(f"protocol.lambd must be > 0, got {lambd}")
        self.shots, self.splits, self.lambd = sorted(set(shots)), splits, lambd
        self.knn_neighbours, self.feature, self.batch_size = knn_neighbours, feature, batch_size
        self.tolerance, self.max_evaluations = tolerance, max_evaluations

    def check(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Refuse, before any work, labels that the protocol cannot be run on.

        Raises:
            UserError: if there is a single class, a class has fewer images than shots, or there are
                fewer images than neighbours.
        """
        k_shot(labels, self.shots, seed=0, classes=classes)
        if len(labels) < self.knn_neighbours:
            raise UserError(
                f"protocol.knn_neighbours={self.knn_neighbours}: only {len(labels)} labelled images"
            )

    def rows(self, name: str, features: LabelledFeatures) -> list[dict[str, Any]]:
        """Rows of lowshot.json for one backbone, accuracies as fractions."""
        rows = [self._logistic(name, features, k) for k in self.shots]
        return [*rows, self._knn(name, features)]

    def _logistic(self, name: str, features: LabelledFeatures, k: int) -> dict[str, Any]:
        num_classes = len(features.classes)
        picked = [
            k_shot(features.train_labels, self.shots, seed=seed, classes=features.classes)[k]
            for seed in range(self.splits)
        ]
        chosen = torch.stack(picked)  # [splits, n]
        strength = self.lambd / chosen.shape[1]
        fit = fit_logistic(
            centre_and_normalise(features.train)[chosen],
            features.train_labels[chosen],
            num_classes=num_classes,
            lambdas=[strength],
            tolerance=self.tolerance,
            max_evaluations=self.max_evaluations,
        )
        logits = centre_and_normalise(features.held_out) @ fit.weight[:, 0].mT  # [splits, m, C]
        right = (logits.argmax(dim=-1) == features.held_out_labels).double().mean(dim=1)
        return {
            "backbone": name,
            "classifier": "logistic",
            "labels": str(k),
            "splits": self.splits,
            "top1_mean": right.mean().item(),
            "top1_std": right.std(correction=0).item(),
            "lambda": strength,
            "lambda_times_labels": self.lambd,
        }

    def _knn(self, name: str, features: LabelledFeatures) -> dict[str, Any]:
        cosines, neighbours = nearest(features.train, features.held_out, self.knn_neighbours)
        labels = features.train_labels[neighbours]
        votes = majority_votes(cosines, labels, len(features.classes))
        right = (votes.argmax(dim=1) == features.held_out_labels).double().mean()
        return {
            "backbone": name,
            "classifier": "knn",
            "labels": "all",
            "splits": 1,
            "top1_mean": right.item(),
            "top1_std": 0.0,
            "lambda": None,
            "neighbours": self.knn_neighbours,
        }


def evaluate(
    protocol: KShot,
    backbones: Mapping[str, VisionTransformer | str],
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    image_size: int,
    num_workers: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Extract features and fit classifiers for several backbones on the same splits.

    Args:
        protocol: what is fitted.
        backbones: names and trunks, or `PIXELS` for raw pixels at `image_size`.
        train: images that may be labelled.
        held_out: images that test; never seen in fitting.
        image_size: side of the pixels baseline; trunks take their own `img_size`.
        num_workers: processes that read images.
        device: where trunks run.

    Returns:
        Rows of lowshot.json.

    Raises:
        UserError: if labels do not suffice or features are not finite.
    """
    protocol.check(train.labels, train.classes)
    rows = []
    for name, backbone in backbones.items():
        parts = []
        for images in (train, held_out):
            if isinstance(backbone, VisionTransformer):
                features = extract_features(
                    backbone,
                    images,
                    transform=evaluation_transform(backbone.img_size),
                    feature=protocol.feature,
                    batch_size=protocol.batch_size,
                    num_workers=num_workers,
                    device=device,
                )
            else:
                transform = evaluation_transform(image_size)
                features = pixel_features(images, transform=transform, num_workers=num_workers)
            parts.append(features)
        labelled = LabelledFeatures(
            parts[0], train.labels, parts[1], held_out.labels, train.classes
        )
        rows += protocol.rows(name, labelled)
    return rows
