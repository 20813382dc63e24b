"""The base class of protocols, and `evaluate`: from backbones and images to rows of the table."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from msn.data.workers import in_one_line, less_memory
from msn.errors import UserError
from msn.evaluation.backbones import FrozenBackbone, Subject
from msn.evaluation.features import FeatureSettings, LabelledSet, Runtime, weights_key
from msn.evaluation.imagenet import is_imagenet, paper_figure
from msn.evaluation.outcomes import above, is_unbalanced, outcome_of
from msn.evaluation.sets import (
    ChosenImages,
    LabelSet,
    Result,
    Trial,
    check_labelled,
    held_out_features,
    labelled_features,
    make_row,
    renumber,
    table_key,
    used_positions,
)
from msn.method.vit import VisionTransformer
from msn.schema import make
from msn.weights.weights import BASELINES, MAJORITY

_MOST_SPLITS = 10_000


class LabelPlan(NamedTuple):
    """The label sets of a protocol in one training pool."""

    sets: list[LabelSet]
    """With positions in `images`."""
    images: LabelledSet
    """The images that any set uses; no others are read."""


class Protocol(ABC):
    """One way to measure a backbone.

    Args:
        features: settings, see `FeatureSettings`.

    Attributes:
        baselines: the default ones: those that cost little and tell much.
        is_the_papers: whether published figures are comparable with this protocol's.
        methods: pretraining methods whose published figures were measured in this way.
    """

    baselines: ClassVar[tuple[str, ...]] = BASELINES
    is_the_papers: bool = False
    methods: tuple[str, ...] = ("msn", "mae")

    def __init__(self, features: Mapping[str, Any]) -> None:
        self.features = make("protocol.features", features, FeatureSettings, complete=True)

    @abstractmethod
    def label_sets(self, train: LabelledSet) -> list[LabelSet]:
        """The label sets within a training pool.

        Raises:
            UserError: the pool does not hold them.
        """

    @abstractmethod
    def run(
        self, subject: Subject, plan: LabelPlan, test: LabelledSet, runtime: Runtime
    ) -> list[Result]:
        """Measure one backbone.

        Args:
            subject: the backbone, or a baseline.
            plan: of this protocol, for the training pool.
            test: held-out images.
            runtime: devices, workers, cache.
        """

    def plan(self, train: LabelledSet) -> LabelPlan:
        """Choose the labelled images, before anything is computed.

        Raises:
            UserError: the pool does not hold what the protocol asks for.
        """
        sets = self.label_sets(train)
        positions = used_positions(sets)
        return LabelPlan(renumber(sets, positions), ChosenImages(train, positions))

    def check(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Refuse, before any work, labels that the protocol cannot use.

        Args:
            labels: class numbers of the training pool, [n].
            classes: their names.

        Raises:
            UserError: too few images, or a single class.
        """
        # Protocols that read more than labels have a check of their own.
        self.label_sets(cast(LabelledSet, _LabelsAlone(labels, classes)))

    def check_backbone(self, backbone: FrozenBackbone) -> None:
        """Refuse, before any work, a backbone that the protocol cannot measure.

        Raises:
            UserError: it has no such feature.
        """
        backbone.check(self.features)


class FeatureProtocol(Protocol):
    """A protocol on frozen features alone."""

    @abstractmethod
    def results(self, trial: Trial) -> list[Result]:
        """Fit and test every classifier of the protocol."""

    def run(
        self, subject: Subject, plan: LabelPlan, test: LabelledSet, runtime: Runtime
    ) -> list[Result]:
        """Extract features of labelled and held-out images, then fit."""
        found = subject.features(plan.images, self.features, runtime, "labelled images")
        train_set = labelled_features(plan.images, found)
        found = subject.features(test, self.features, runtime, "held-out images")
        test_set = held_out_features(test, found)
        kind, device = subject.kind(self.features), runtime.devices[0]
        results = self.results(Trial(subject.name, kind, plan.sets, train_set, test_set, device))
        return with_unreadable(results, labelled=train_set.replaced, held_out=test_set.replaced)


def with_unreadable(results: list[Result], *, labelled: int, held_out: int) -> list[Result]:
    """Add to the rows how many images could not be read.

    Args:
        results: of one backbone.
        labelled: number of unreadable training images, which others of their class replace.
        held_out: number of unreadable test images, which count as wrong.
    """
    for result in results:
        result.row.update(replaced_images=labelled, unreadable_test_images=held_out)
    return results


def check_draws(splits: int, seed: int) -> None:
    """Raise a UserError unless `splits` and `seed` are in range."""
    if not 1 <= splits <= _MOST_SPLITS:
        raise UserError(f"protocol.splits must be in [1, {_MOST_SPLITS}], got {splits}")
    if not 0 <= seed < 2**32:
        raise UserError(f"protocol.seed must be in [0, 2^32), got {seed}")


class _LabelsAlone:
    """A labelled set of which only the labels are known."""

    def __init__(self, labels: Tensor, classes: Sequence[str]) -> None:
        self.labels, self.classes = labels, list(classes)

    def __len__(self) -> int:
        return len(self.labels)


def evaluate(
    protocol: Protocol,
    subjects: Sequence[Subject],
    train: LabelledSet,
    held_out: LabelledSet,
    *,
    num_workers: int,
    device: torch.device | tuple[torch.device, ...],
    cache_dir: Path | None = None,
    shared: bool = False,
    majority: bool = False,
) -> list[Result]:
    """Run a protocol on every backbone, with the same labelled images for all.

    Args:
        protocol: which images are labelled and what is fitted.
        subjects: backbones from `open_backbones`, and baselines.
        train: labelled pool.
        held_out: test images; nothing is chosen on them.
        num_workers: processes that decode, per device.
        device: one or several; the first fits classifiers.
        cache_dir: where features are kept between calls; None keeps none.
        shared: whether every process of the default group makes this call and shares the
            extraction. All get the same results; one should write them.
        majority: whether to add rows that predict the largest class of `train` for every image.

    Returns:
        Rows of `lowshot.json`, with fitted heads.

    Raises:
        UserError: the images, a backbone and the protocol do not fit each other.
    """
    check_labelled(train, held_out)
    devices = device if isinstance(device, tuple) else (device,)
    runtime = Runtime(devices, num_workers, cache_dir, shared)
    plan = protocol.plan(train)
    comparable = protocol.is_the_papers and is_imagenet(train.classes)
    batch_size = protocol.features.batch_size
    results = []
    for subject in subjects:
        with in_one_line(lambda: less_memory("protocol.features.batch_size", batch_size)):
            found = protocol.run(subject, plan, held_out, runtime)
        _say_what(found, subject, protocol.features.crop)
        _set_beside_paper(found, subject if comparable else None, protocol.methods)
        results += found
    if majority:
        results += _majority(results, train, held_out)
    _set_beside_floors(results)
    return results


def _majority(results: Sequence[Result], train: LabelledSet, held_out: LabelledSet) -> list[Result]:
    """Rows that predict the largest class for every image, one for each column of the table."""
    largest = int(torch.bincount(train.labels).argmax())
    predicted = torch.full((1, len(held_out)), largest)
    outcome = outcome_of(held_out.labels, predicted, held_out.classes)
    made = make_row(
        backbone=MAJORITY,
        classifier="",
        labels="",
        outcome=outcome,
        splits=[train.classes[largest]],
    )
    columns = {
        table_key(result.row): result.row
        for result in reversed(results)
        if result.row["classifier"] != "spreading"
    }
    kept = ("classifier", "labels", "variant", "neighbours", "labelled_images")
    return [
        Result(
            {**made, "paper": None, **{key: row[key] for key in kept if key in row}}, None, outcome
        )
        for row in reversed(columns.values())
    ]


def _set_beside_floors(results: Sequence[Result]) -> None:
    """Add to every backbone's row how far it is above each baseline of its column.

    Unbalanced classes are compared by balanced accuracy, but with the majority class by top-1, at
    which it is good.
    """
    for result in results:
        if result.row["backbone"] in BASELINES or result.outcome is None:
            continue
        floors = {
            other.row["backbone"]: above(
                result.outcome,
                other.outcome,
                balanced=is_unbalanced(result.row) and other.row["backbone"] != MAJORITY,
            )
            for other in results
            if other.row["backbone"] in BASELINES
            and table_key(other.row) == table_key(result.row)
            and other.outcome is not None
        }
        result.row["above"] = floors


def _say_what(results: Sequence[Result], subject: Subject, crop: str) -> None:
    """Add the digest of the weights, the image size, and the crop if it is not the centre crop."""
    for result in results if crop != "centre" else []:
        result.row["crop"] = crop
    if isinstance(subject, FrozenBackbone):
        digest = weights_key(subject.trunk)
        for result in results:
            result.row.update(weights=digest, image_size=subject.image_size)


def _set_beside_paper(
    results: Sequence[Result], subject: Subject | None, methods: Sequence[str]
) -> None:
    """Add the published figure for the architecture; None if there is none."""
    for result in results:
        figure = None
        if isinstance(subject, FrozenBackbone) and not subject.is_baseline:
            classifier, labels = result.row["classifier"], result.row["labels"]
            method = subject.about.get("pretrained_by", "msn")
            if isinstance(subject.trunk, VisionTransformer) and method in methods:
                figure = paper_figure(subject.trunk.model_config, classifier, labels, method)
        result.row["paper"] = None if figure is None else figure._asdict()
