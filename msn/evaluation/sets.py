"""Label sets, features with labels, and the rows of the low-shot table that they give."""

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
# How tables call them.
CLASSIFIERS = {
    "logistic": "logistic",
    "linear": "linear",
    "attentive": "attentive",
    "finetune": "fine-tuned",
    "spreading": "spreading",
}


class Head(NamedTuple):
    """A fitted linear classifier and what features it wants."""

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
    """Whether each row is divided by its length then."""
    split: str
    """The label set it was fitted on."""


class Result(NamedTuple):
    """A row of the table, and one of the heads behind it where there are linear heads."""

    row: Row
    head: Head | None = None
    outcome: Outcome | None = None
    """The predictions behind it."""


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
        backbone: `msn`, `random`, `pixels`, `majority` or what the user called it.
        classifier: `knn`, or one of `CLASSIFIERS`.
        labels: `1`, `2`, `5`, `1%`, `all`, ...
        outcome: predictions for the test images, of S label sets.
        splits: names of the label sets, S of them.
        more: further plain values; `lambda_` is written as `lambda`, null where there is none.
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
    """A name for tables and pictures: what cannot be printed becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def formula_free(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula begins with an apostrophe."""
    starts = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if starts else value


def table_key(row: Row) -> tuple[str, str, str]:
    """What tells a row from the others of its backbone: classifier, labels, variant."""
    return row["classifier"], row["labels"], str(row.get("variant", ""))


class LabelSet(NamedTuple):
    """The images that one classifier may learn from."""

    labels: str
    """How the table calls sets of this size: `1`, `2`, `5`, `1%`, `all`."""
    split: str
    """Which draw or list it is, e.g. `seed 3`, `split1/5imgs_class.txt`."""
    positions: Tensor
    """Images of the training pool, sorted, [n]."""


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
    """Features of images with what is known about these."""

    features: Tensor
    """float32 [n, D]."""
    labels: Tensor
    """In [0, C), [n]."""
    classes: Sequence[str]
    """Names, C of them."""
    replaced: int = 0
    """Images that cannot be read."""
    unreadable: Tensor | None = None
    """Which ones, bool [n]; None where all can be or others of their class stand in."""
    groups: Tensor | None = None
    """Numbers of groups whose images cross-validation does not part, [n]; None without groups."""

    def outcome(self, predicted: Tensor, scores: Tensor | None = None) -> Outcome:
        """What classifiers said of these images: predicted [S, n], scores of the first [n, C]."""
        return outcome_of(
            self.labels, predicted, self.classes, unreadable=self.unreadable, scores=scores
        )


class Trial(NamedTuple):
    """Features of one backbone: what classifiers learn from, and what tests them."""

    backbone: str
    """Its name."""
    feature: str
    """Kind of the features, kept with the heads."""
    sets: Sequence[LabelSet]
    """With positions within `train`; those of one `labels` make a row."""
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
    """Features to learn from; an image that cannot be read is another one of its class."""
    count = int(found.replaced.sum())
    return FeatureSet(found.rows, images.labels, images.classes, count, groups=images.groups)


def held_out_features(images: LabelledSet, found: Extracted) -> FeatureSet:
    """Features to test on; an image that cannot be read counts as wrong whatever is predicted."""
    count = int(found.replaced.sum())
    return FeatureSet(found.rows, images.labels, images.classes, count, found.replaced)


def used_positions(sets: Iterable[LabelSet]) -> Tensor:
    """All images that any of the sets uses, sorted: no others need features."""
    return torch.cat([labelled.positions for labelled in sets]).unique()


def renumber(sets: Iterable[LabelSet], positions: Tensor) -> list[LabelSet]:
    """The same sets within the images at sorted `positions`."""
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
