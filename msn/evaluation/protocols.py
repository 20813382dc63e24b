"""Protocols on frozen features: KShot, Fraction, ImageNetLowShot and KNN.

`linear.py`, `finetune.py` and `heads.py` hold the others.
"""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from msn.data.subsets import SHORT_CLASSES, positions_of, read_names, write_names
from msn.errors import UserError
from msn.evaluation.features import LabelledSet
from msn.evaluation.frozen import Logistic, check_lambda_choice, knn_results, logistic_results
from msn.evaluation.imagenet import ONE_PERCENT, are_the_papers, find_lists, official_sets
from msn.evaluation.lowshot import FeatureProtocol, LabelPlan, check_draws
from msn.evaluation.neighbours import Spreading, spreading_results
from msn.evaluation.sets import LabelSet, Result, Trial, all_labels, drawn_shares, drawn_shots
from msn.files import writing_to
from msn.method.distributed import process_index
from msn.schema import make
from msn.weights.weights import MAJORITY, RANDOM

log = logging.getLogger(__name__)

USUAL_SHOTS = (1, 2, 5)  # the paper's Table 1


class _FewLabels(FeatureProtocol):
    """Logistic regression on few labels, and optionally kNN on all."""

    def __init__(
        self,
        logistic: Mapping[str, Any],
        knn_neighbours: int | None,
        features: Mapping[str, Any],
        write_lists: str | None = None,
        spreading: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(features)
        self.write_lists, self.spreading, self._spreads = write_lists, None, False
        if spreading is not None:
            self.spreading = make("protocol.spreading", spreading, Spreading, complete=True)
        self.logistic = make("protocol.logistic", logistic, Logistic, complete=True)
        if knn_neighbours is not None and knn_neighbours < 1:
            raise UserError(
                f"protocol.knn_neighbours must be >= 1, or null for no kNN, got {knn_neighbours}"
            )
        self.knn_neighbours = knn_neighbours

    @abstractmethod
    def few_labels(self, train: LabelledSet) -> list[LabelSet]:
        """The sets for logistic regression."""

    def check(self, labels: Tensor, classes: Sequence[str]) -> None:
        """As `Protocol`, and try now, not after the training, whether lists can be written.

        Raises:
            UserError: too few images, a single class, or a place that cannot be written to.
        """
        super().check(labels, classes)
        if self.write_lists is not None:
            place = Path(self.write_lists)
            missing = [folder for folder in (place, *place.parents) if not folder.exists()]
            with writing_to(place):
                place.mkdir(parents=True, exist_ok=True)
                for folder in missing:  # the check leaves nothing behind
                    folder.rmdir()

    def plan(self, train: LabelledSet) -> LabelPlan:
        """Choose the labelled images, and write lists of them if wanted."""
        plan = super().plan(train)
        if self.spreading is not None and not self._spreads:
            log.info(
                "label spreading is left out: %d training images are more than "
                "protocol.spreading.most_images=%d",
                *(len(train), self.spreading.most_images),
            )
        if self.write_lists is not None and process_index() == 0:
            names = plan.images.names
            for labelled in self._few(plan.sets):
                path = Path(self.write_lists) / _list_name(labelled)
                write_names(path, [names[i] for i in labelled.positions.tolist()])
        return plan

    def _few(self, sets: Sequence[LabelSet]) -> list[LabelSet]:
        """The sets for logistic regression among those of `label_sets`."""
        return list(sets)[:-1] if self._takes_all else list(sets)

    @property
    def _takes_all(self) -> bool:
        """Whether all images of the training pool take part, not only the labelled ones."""
        return self.knn_neighbours is not None or self._spreads

    def label_sets(self, train: LabelledSet) -> list[LabelSet]:
        """Sets with few labels, and all images if kNN or label spreading takes part."""
        # The graph and the shares of each class grow with all images of the pool.
        self._spreads = self.spreading is not None and len(train) <= self.spreading.most_images
        sets = self.few_labels(train)
        self.check_choice(sets, train.labels)
        if self.knn_neighbours is not None and len(train) < self.knn_neighbours:
            raise UserError(
                f"protocol.knn_neighbours={self.knn_neighbours}: must be at most the number of "
                f"labelled images, {len(train)}; null leaves kNN out"
            )
        return [*sets, all_labels(train)] if self._takes_all else sets

    def check_choice(self, sets: Sequence[LabelSet], labels: Tensor) -> None:
        """Refuse, before any work, label sets that cannot choose lambda."""
        check_lambda_choice(self.logistic, sets, labels)

    def results(self, trial: Trial) -> list[Result]:
        """Rows `logistic` and `spreading` for few labels and a row `knn` for all."""
        few = trial._replace(sets=self._few(trial.sets))
        found = logistic_results(few, self.logistic)
        if self.spreading is not None and self._spreads:
            found += spreading_results(few, self.spreading)
        if self.knn_neighbours is None:
            return found
        last = trial._replace(sets=trial.sets[-1:])
        return found + knn_results(last, [self.knn_neighbours], None)


class KShot(_FewLabels):
    """k labelled images per class in several seeded draws; smaller sets are part of larger ones.

    Args:
        shots: images per class; None takes those of 1, 2 and 5 that every class has, and leaves
            kNN out if there are too few images for it.
        splits: number of draws of each, in [1, 10000].
        seed: of the first draw; the next draws take the next seeds.
        lists: files of image names, one set each, instead of draws; None draws.
        write_lists: directory for the names of every set; None writes none.
        logistic: settings, see `frozen.Logistic`.
        knn_neighbours: k of kNN by cosine and majority on all labels; None leaves it out.
        features: settings, see `FeatureSettings`.
        short_classes: what to do with classes of fewer images than `shots`: `refuse`, `take_all`
            (all that they have) or `leave_out` (none: their test images count as wrong).
        spreading: settings of label spreading over all images, see `Spreading`; None leaves it out.
    """

    def __init__(
        self,
        *,
        shots: list[int] | None,
        splits: int,
        seed: int,
        lists: list[str] | None,
        write_lists: str | None,
        logistic: dict[str, Any],
        knn_neighbours: int | None,
        features: dict[str, Any],
        short_classes: str = "refuse",
        spreading: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(logistic, knn_neighbours, features, write_lists, spreading)
        check_draws(splits, seed)
        if short_classes not in SHORT_CLASSES:
            raise UserError(
                f"protocol.short_classes must be one of {', '.join(SHORT_CLASSES)}, got "
                f"{short_classes}"
            )
        self.short_classes = short_classes
        if shots is not None and (not shots or min(shots) < 1):
            raise UserError(f"protocol.shots must be a list of numbers >= 1, got {shots}")
        if lists is not None and not lists:
            raise UserError("protocol.lists=[]: name at least one file, or null to draw")
        if lists is not None and write_lists is not None:
            raise UserError("protocol.write_lists: protocol.lists are there already; give one")
        self.shots = None if shots is None else sorted(set(shots))
        self.splits, self.seed, self.lists = splits, seed, lists
        self._short: dict[str, dict[str, Any] | None] = {}

    def few_labels(self, train: LabelledSet) -> list[LabelSet]:
        """Seeded sets in the order of their size, or the sets of the given lists."""
        if self.lists is not None:
            return sorted((_listed(Path(path), train) for path in self.lists), key=_size)
        shots = self.shots
        if shots is None:
            smallest = int(torch.bincount(train.labels, minlength=len(train.classes)).min())
            shots = [k for k in USUAL_SHOTS if k <= max(1, smallest)]
        counts = torch.bincount(train.labels, minlength=len(train.classes)).tolist()
        for k in shots:
            short = {n: c for n, c in zip(train.classes, counts, strict=True) if c < k}
            self._short[str(k)] = {"rule": self.short_classes, "images": short} if short else None
        seeds = range(self.seed, self.seed + self.splits)
        return drawn_shots(train, shots, seeds, short=self.short_classes)

    def results(self, trial: Trial) -> list[Result]:
        """As `_FewLabels`; rows also say which classes have too few images."""
        found = super().results(trial)
        for result in found:
            if (short := self._short.get(result.row["labels"])) is not None:
                result.row["short_classes"] = short
        return found

    def label_sets(self, train: LabelledSet) -> list[LabelSet]:
        """Sets with few labels, and all images if kNN is wanted and possible."""
        if self.shots is None and len(train) < (self.knn_neighbours or 0):
            log.info("no %d-NN: there are %d labelled images", self.knn_neighbours, len(train))
            self.knn_neighbours = None
        return super().label_sets(train)

    def check(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Refuse pools that are too small for the draws, and lists that do not exist.

        `plan` compares the lists with the images.
        """
        if self.lists is None:
            super().check(labels, classes)
        for path in self.lists or []:
            read_names(Path(path))


class Fraction(_FewLabels):
    """A share of every class, at least one image of each, in several seeded draws.

    Args:
        fractions: shares in (0, 1].
        splits: number of draws of each share below 1, in [1, 10000].
        seed: of the first draw; the next draws take the next seeds.
        write_lists: directory for the names of every set; None writes none.
        logistic: settings, see `frozen.Logistic`.
        knn_neighbours: of a kNN on all labels; None leaves it out.
        features: settings, see `FeatureSettings`.
    """

    def __init__(
        self,
        *,
        fractions: list[float],
        splits: int,
        seed: int,
        write_lists: str | None,
        logistic: dict[str, Any],
        knn_neighbours: int | None,
        features: dict[str, Any],
    ) -> None:
        super().__init__(logistic, knn_neighbours, features, write_lists)
        check_draws(splits, seed)
        if not fractions or not all(0 < share <= 1 for share in fractions):
            raise UserError(
                f"protocol.fractions must be a list of shares in (0, 1], got {fractions}"
            )
        self.fractions, self.splits, self.seed = sorted(set(fractions)), splits, seed

    def few_labels(self, train: LabelledSet) -> list[LabelSet]:
        """Seeded sets in the order of their size."""
        return [
            labelled
            for share in self.fractions
            for labelled in drawn_shares(
                train, share, range(self.seed, self.seed + (self.splits if share < 1 else 1))
            )
        ]


class ImageNetLowShot(_FewLabels):
    """The paper's table: 1, 2, 5 images per class in three official splits, and the official 1 %.

    Args:
        lists_dir: where the official lists are, `splitN/` or `imagenet_subsetsN/` below it. None
            fetches them once from the reference's repository and keeps them in the user's cache.
        shots: which of 1, 2, 5.
        one_percent: whether to include the 1 % list.
        logistic: settings for 1, 2, 5, see `frozen.Logistic`.
        one_percent_lambd: `logistic.lambd` for the 1 %; the author's value for ViT-S/16.
        knn_neighbours: of a kNN on all labels; None leaves it (and 1.28 M images) out.
        features: settings, see `FeatureSettings`.
    """

    baselines: ClassVar[tuple[str, ...]] = (RANDOM, MAJORITY)
    is_the_papers = True

    def __init__(
        self,
        *,
        lists_dir: str | None,
        shots: list[int],
        one_percent: bool,
        logistic: dict[str, Any],
        one_percent_lambd: float | None,
        knn_neighbours: int | None,
        features: dict[str, Any],
    ) -> None:
        super().__init__(logistic, knn_neighbours, features)
        self.one_percent_logistic = make(
            "protocol.logistic", {**logistic, "lambd": one_percent_lambd}, Logistic, complete=True
        )
        if not set(shots) <= {1, 2, 5} or not (shots or one_percent):
            raise UserError(
                f"protocol.shots must be among 1, 2, 5 (the official lists), got {shots}"
            )
        self._directory = None if lists_dir is None else Path(lists_dir)
        self._wanted: dict[str, Any] = {"shots": sorted(set(shots)), "one_percent": one_percent}

    def few_labels(self, train: LabelledSet) -> list[LabelSet]:
        """The official sets, three for each of 1, 2, 5, one for 1 %."""
        sets = official_sets(self._directory, train, **self._wanted)
        if self._directory is not None:
            self.is_the_papers = are_the_papers(self._directory, **self._wanted)
        return sets

    def check(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Find or fetch the lists; `plan` compares them with the images."""
        find_lists(self._directory, **self._wanted)

    def check_choice(self, sets: Sequence[LabelSet], labels: Tensor) -> None:
        """Refuse, before any work, label sets that cannot choose lambda."""
        for settings, percent in ((self.logistic, False), (self.one_percent_logistic, True)):
            own = [labelled for labelled in sets if (labelled.labels == ONE_PERCENT) is percent]
            check_lambda_choice(settings, own, labels)

    def results(self, trial: Trial) -> list[Result]:
        """Rows `logistic` for 1, 2, 5 and 1 %, each with its own lambda, and `knn`."""
        percent = [labelled for labelled in trial.sets if labelled.labels == ONE_PERCENT]
        others = [labelled for labelled in trial.sets if labelled.labels != ONE_PERCENT]
        found = super().results(trial._replace(sets=others))
        last = logistic_results(trial._replace(sets=percent), self.one_percent_logistic)
        at = len(found) if self.knn_neighbours is None else len(found) - 1
        return found[:at] + last + found[at:]


class KNN(FeatureProtocol):
    """k nearest neighbours on all labels.

    Args:
        neighbours: numbers k, a row each.
        temperature: of the votes exp(cosine / temperature); None counts votes equally.
        features: settings, see `FeatureSettings`.
    """

    def __init__(
        self, *, neighbours: list[int], temperature: float | None, features: dict[str, Any]
    ) -> None:
        super().__init__(features)
        if not neighbours or min(neighbours) < 1:
            raise UserError(f"protocol.neighbours must be a list of numbers >= 1, got {neighbours}")
        if temperature is not None and not temperature > 0:
            raise UserError(f"protocol.temperature must be > 0, or null, got {temperature}")
        self.neighbours, self.temperature = sorted(set(neighbours)), temperature

    def label_sets(self, train: LabelledSet) -> list[LabelSet]:
        """All images."""
        if len(train) < max(self.neighbours):
            raise UserError(
                f"protocol.neighbours={self.neighbours}: there are only {len(train)} images"
            )
        return [all_labels(train)]

    def results(self, trial: Trial) -> list[Result]:
        """A row `knn` for each number of neighbours."""
        return knn_results(trial, self.neighbours, self.temperature)


def _listed(path: Path, train: LabelledSet) -> LabelSet:
    """A label set from a file of names; its name is the number of images per class, if equal."""
    names = read_names(path)
    positions = positions_of(names, train.names, classes=train.classes, where=str(path))
    counts = torch.bincount(train.labels[positions], minlength=len(train.classes))
    without = [name for name, count in zip(train.classes, counts, strict=True) if not count]
    if without:
        log.warning("%s lists no image of %d classes (first: %s)", path, len(without), without[0])
    same = int(counts.min()) == int(counts.max())
    return LabelSet(str(int(counts[0])) if same else f"{len(names)} images", str(path), positions)


def _list_name(labelled: LabelSet) -> str:
    """Path of a set's list, as in the official ones."""
    folder = labelled.split.replace(" ", "_")
    if labelled.labels.endswith("%"):
        return f"{folder}/{labelled.labels[:-1]}percent.txt"
    return f"{folder}/{labelled.labels}imgs_class.txt"


def _size(labelled: LabelSet) -> int:
    return len(labelled.positions)
