"""Label sets, images and features with labels, heads, and the rows of the low-shot table."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from msn.data.dataset import REPLACED, Subset
from msn.data.subsets import fraction_of_each_class, k_shot
from msn.errors import UserError
from msn.evaluation.features import Extracted, LabelledSet
from msn.evaluation.outcomes import Outcome, measured, outcome_of
from msn.images.kinds import BadImageError

Row = dict[str, Any]
# Names of classifiers in tables.
CLASSIFIERS = {
    "logistic": "logistic",
    "linear": "linear",
    "attentive": "attentive",
    "finetune": "fine-tuned",
    "spreading": "spreading",
}


class Head(NamedTuple):
    """A fitted linear classifier, and the features that it takes."""

    weight: Tensor
    """[C, D]."""
    bias: Tensor | None
    """[C]."""
    classes: Sequence[str]
    feature: str
    """See `features.check_feature`, or `pixels`."""
    centred: bool
    """Whether each row of features is centred first."""
    normalised: bool
    """Whether each row is then divided by its length."""
    split: str
    """The label set it was fitted on."""


class Result(NamedTuple):
    """A row of the table, with a head and the predictions that belong to it."""

    row: Row
    head: Head | None = None
    """Of the first label set; None if the classifier is not linear."""
    outcome: Outcome | None = None


def make_row(
    *,
    backbone: str,
    classifier: str,
    labels: str,
    outcome: Outcome,
    splits: Sequence[str],
    **more: Any,
) -> Row:
    """A row in the schema of `lowshot.json`.

    Args:
        backbone: `msn`, `random`, `pixels`, `majority` or the user's name for it.
        classifier: `knn`, or one of `CLASSIFIERS`.
        labels: `1`, `2`, `5`, `1%`, `all`, ...
        outcome: predictions for the test images, of S label sets.
        splits: names of the label sets, S of them.
        more: further plain values; `lambda_` is written as `lambda`, null if missing.
    """
    strength = more.pop("lambda_", None)
    return {
        "backbone": backbone,
        "classifier": classifier,
        "labels": labels,
        "splits": len(outcome.predicted),
        **measured(outcome),
        "lambda": strength,
        "split_names": list(splits),
        "test_images": len(outcome.truth),
        **more,
    }


def printable(name: str) -> str:
    """A name for tables and pictures, with a question mark for each unprintable character."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def formula_free(value: Any) -> Any:
    """A cell, with an apostrophe before text that a spreadsheet would read as a formula."""
    starts = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if starts else value


def table_key(row: Row) -> tuple[str, str, str]:
    """What identifies a row among those of its backbone: classifier, labels, variant."""
    return row["classifier"], row["labels"], str(row.get("variant", ""))


class LabelSet(NamedTuple):
    """The images that one classifier may learn from."""

    labels: str
    """Name in the table of sets of this size: `1`, `2`, `5`, `1%`, `all`."""
    split: str
    """The draw or list, e.g. `seed 3`, `split1/5imgs_class.txt`."""
    positions: Tensor
    """Positions in the training pool, sorted, [n]."""


def all_labels(train: LabelledSet) -> LabelSet:
    """The whole training pool as a label set."""
    return LabelSet("all", "all", torch.arange(len(train)))


def drawn_shots(
    train: LabelledSet, shots: Sequence[int], seeds: Iterable[int], *, short: str = "refuse"
) -> list[LabelSet]:
    """Nested draws of k images per class, in the order of k, then of the seeds; see `k_shot`."""
    draws = {
        seed: k_shot(train.labels, shots, seed=seed, classes=train.classes, short=short)
        for seed in seeds
    }
    return [
        LabelSet(str(k), f"seed {seed}", draw[k]) for k in shots for seed, draw in draws.items()
    ]


def drawn_shares(train: LabelledSet, share: float, seeds: Iterable[int]) -> list[LabelSet]:
    """Draws of a share of every class, at least one image of each."""
    labels, classes = train.labels, train.classes
    return [
        LabelSet(
            f"{100 * share:g}%",
            f"seed {seed}",
            fraction_of_each_class(labels, share, seed=seed, classes=classes),
        )
        for seed in seeds
    ]


class FeatureSet(NamedTuple):
    """Features of images, with their labels and groups."""

    features: Tensor
    """float32 [n, D]."""
    labels: Tensor
    """In [0, C), [n]."""
    classes: Sequence[str]
    """Names, C of them."""
    replaced: int = 0
    """Number of images that cannot be read."""
    unreadable: Tensor | None = None
    """Which ones count as wrong, bool [n]; None if others of their class replace them."""
    groups: Tensor | None = None
    """Groups whose images stay together in cross-validation, [n]; None without groups."""

    def outcome(self, predicted: Tensor, scores: Tensor | None = None) -> Outcome:
        """Outcome of predictions [S, n] for these images, with scores of the first set [n, C]."""
        return outcome_of(
            self.labels, predicted, self.classes, unreadable=self.unreadable, scores=scores
        )


class Trial(NamedTuple):
    """Features of one backbone, to train and to test classifiers."""

    backbone: str
    """Its name."""
    feature: str
    """Kind of the features, stored with the heads."""
    sets: Sequence[LabelSet]
    """With positions in `train`; sets with the same `labels` make one row."""
    train: FeatureSet
    test: FeatureSet
    device: torch.device
    """Where to fit."""


class ChosenImages:
    """Some images of a labelled set, renumbered from 0.

    Args:
        images: all images.
        positions: which ones, [n].
    """

    def __init__(self, images: LabelledSet, positions: Tensor) -> None:
        self._images, self._positions = images, positions.tolist()
        self.labels = images.labels[positions]
        self.classes = images.classes
        self.groups = None if images.groups is None else images.groups[positions]
        names = images.names
        self.names = [names[i] for i in self._positions]

    def identity(self, i: int) -> str:
        """A key that changes with the content of image i."""
        return self._images.identity(self._positions[i])

    def __len__(self) -> int:
        """Number of images."""
        return len(self._positions)

    def __getitem__(self, i: int) -> Image.Image:
        """Image i of the chosen ones."""
        return self._images[self._positions[i]]


class UnlabelledImages:
    """All images of a pool, as features are extracted from them; an unreadable one is gray.

    Args:
        pool: images of a source.
    """

    groups = None

    def __init__(self, pool: Subset) -> None:
        self.pool, self.classes = pool, list[str]()

    @property
    def labels(self) -> Tensor:
        """Zeros, [n]."""
        return torch.zeros(len(self), dtype=torch.long)

    @property
    def names(self) -> list[str]:
        """Names of the images, in order."""
        return [self.pool.name(i) for i in range(len(self))]

    def identity(self, i: int) -> str:
        """A key that changes with the content of image i."""
        return self.pool.identity(i)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pool)

    def __getitem__(self, i: int) -> Image.Image:
        """Image i, or a gray one."""
        image = open_image(self.pool, i)
        if image is None:
            image = Image.new("RGB", (64, 64), (127, 127, 127))
            image.info[REPLACED] = True
        return image


def open_image(pool: Subset, i: int) -> Image.Image | None:
    """Image i of a pool, RGB; None if it cannot be read."""
    try:
        return pool.source.rgb(int(pool.positions[i]))
    except BadImageError:
        return None


def labelled_features(images: LabelledSet, found: Extracted) -> FeatureSet:
    """Features to learn from; an unreadable image is replaced by another one of its class."""
    count = int(found.replaced.sum())
    return FeatureSet(found.rows, images.labels, images.classes, count, groups=images.groups)


def held_out_features(images: LabelledSet, found: Extracted) -> FeatureSet:
    """Features to test on; an unreadable image counts as wrong, whatever is predicted."""
    count = int(found.replaced.sum())
    return FeatureSet(found.rows, images.labels, images.classes, count, found.replaced)


def used_positions(sets: Iterable[LabelSet]) -> Tensor:
    """Positions that any of the sets uses, sorted: no other image needs features."""
    return torch.cat([labelled.positions for labelled in sets]).unique()


def renumber(sets: Iterable[LabelSet], positions: Tensor) -> list[LabelSet]:
    """The same sets, with positions within the images at sorted `positions`."""
    return [
        labelled._replace(positions=torch.searchsorted(positions, labelled.positions))
        for labelled in sets
    ]


def check_labelled(train: LabelledSet, test: LabelledSet) -> None:
    """Raise a UserError unless both have images, at least two classes, and the same ones."""
    for what, images in (("training", train), ("held-out", test)):
        if len(images) == 0:
            raise UserError(f"evaluation: there are no labelled {what} images")
    if len(train.classes) < 2 or len(train.labels.unique()) < 2:
        found = ", ".join(train.classes[:1]) or "none"
        raise UserError(f"evaluation: at least two classes are needed, found only {found}")
    if list(train.classes) != list(test.classes):
        raise UserError("evaluation: training and held-out images have different classes")
