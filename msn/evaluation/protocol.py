"""What every protocol is: settings that choose labelled images and turn a backbone into rows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from msn.errors import UserError
from msn.evaluation.backbones import Subject
from msn.evaluation.features import FeatureSettings, LabelledSet, Runtime
from msn.evaluation.frozen import Logistic
from msn.evaluation.sets import (
    ChosenImages,
    FeatureSet,
    LabelSet,
    Result,
    held_out_features,
    labelled_features,
    renumber,
    used_positions,
)
from msn.schema import refuse_unknown, take

ALL = "all"
_MOST_SPLITS = 10_000


class Plan(NamedTuple):
    """What a protocol will learn from in one training pool."""

    sets: list[LabelSet]
    """Positions are within `images`."""
    images: LabelledSet
    """The images that some set uses; no others are looked at."""


class Protocol(ABC):
    """One way to measure a backbone.

    Args:
        features: settings, see `FeatureSettings`.

    Attributes:
        baselines: what stands beside the backbones unless a person says otherwise: what costs
            little and tells much.
        is_the_papers: whether figures of the paper may stand beside this protocol's.
    """

    baselines: ClassVar[tuple[str, ...]] = ("random", "pixels")
    is_the_papers: bool = False

    def __init__(self, features: Mapping[str, Any]) -> None:
        refuse_unknown("protocol.features", features, FeatureSettings)
        self.features = FeatureSettings(**take("protocol.features", features, FeatureSettings))

    @abstractmethod
    def label_sets(self, train: LabelledSet) -> list[LabelSet]:
        """The label sets within a training pool.

        Raises:
            UserError: the pool does not hold them.
        """

    @abstractmethod
    def run(
        self, subject: Subject, plan: Plan, test: LabelledSet, runtime: Runtime
    ) -> list[Result]:
        """Measure one backbone.

        Args:
            subject: the backbone, or a baseline.
            plan: of this protocol, for the training pool.
            test: held-out images.
            runtime: devices, workers, cache.
        """

    def plan(self, train: LabelledSet) -> Plan:
        """Choose the labelled images, before anything is computed.

        Raises:
            UserError: the pool does not hold what the protocol asks for.
        """
        sets = self.label_sets(train)
        positions = used_positions(sets)
        return Plan(renumber(sets, positions), ChosenImages(train, positions))

    def check(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Refuse, before any work, labels that the protocol cannot be run on.

        Args:
            labels: class numbers of the training pool, [n].
            classes: their names.

        Raises:
            UserError: too few images, or a single class.
        """
        self.label_sets(_LabelsAlone(labels, classes))  # type: ignore[arg-type]


class FeatureProtocol(Protocol):
    """A protocol that sees frozen features alone."""

    @abstractmethod
    def results(
        self,
        backbone: str,
        sets: Sequence[LabelSet],
        train: FeatureSet,
        test: FeatureSet,
        *,
        feature: str,
        device: torch.device,
    ) -> list[Result]:
        """Fit and test every classifier of the protocol.

        Args:
            backbone: its name.
            sets: label sets with positions within `train`.
            train: features of the images that the sets use.
            test: features of the held-out images.
            feature: kind of these features.
            device: where to compute.
        """

    def run(
        self, subject: Subject, plan: Plan, test: LabelledSet, runtime: Runtime
    ) -> list[Result]:
        """Extract features of labelled and held-out images, then fit."""
        found = subject.features(plan.images, self.features, runtime, "labelled images")
        train_set = labelled_features(plan.images, found)
        found = subject.features(test, self.features, runtime, "held-out images")
        test_set = held_out_features(test, found)
        results = self.results(
            subject.name,
            plan.sets,
            train_set,
            test_set,
            feature=subject.kind(self.features),
            device=runtime.devices[0],
        )
        return with_unreadable(results, labelled=train_set.replaced, held_out=test_set.replaced)


def with_unreadable(results: list[Result], *, labelled: int, held_out: int) -> list[Result]:
    """Add to the rows how many images could not be read.

    Args:
        results: of one backbone.
        labelled: images to learn from that others of their class replace.
        held_out: test images, each of which counts as wrong.
    """
    for result in results:
        result.row.update(replaced_images=labelled, unreadable_test_images=held_out)
    return results


def all_labels(train: LabelledSet) -> LabelSet:
    """The whole training pool as a label set."""
    return LabelSet(ALL, ALL, torch.arange(len(train)))


def check_draws(splits: int, seed: int) -> None:
    """Raise a UserError unless so many seeded draws of labelled images can be made."""
    if not 1 <= splits <= _MOST_SPLITS:
        raise UserError(f"protocol.splits must be in [1, {_MOST_SPLITS}], got {splits}")
    if not 0 <= seed < 2**32:
        raise UserError(f"protocol.seed must be in [0, 2^32), got {seed}")


def build_logistic(settings: Mapping[str, Any]) -> Logistic:
    """`frozen.Logistic` from a protocol's file.

    Raises:
        UserError: an unknown key, or a value that is out of range.
    """
    refuse_unknown("protocol.logistic", settings, Logistic)
    return Logistic(**take("protocol.logistic", settings, Logistic))


class _LabelsAlone:
    """A labelled set of which nothing but the labels is known yet."""

    def __init__(self, labels: Tensor, classes: Sequence[str]) -> None:
        self.labels, self.classes = labels, list(classes)

    def __len__(self) -> int:
        return len(self.labels)
