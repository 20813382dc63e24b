"""Rows of the low-shot table: what was measured, how sure it is, and what it was measured with."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Row = dict[str, Any]
CLASSIFIERS = ("logistic", "knn", "linear", "finetune")

_RESAMPLES = 1000
_CONFIDENCE = 0.95
# Indices drawn at once while resampling.
_MAX_DRAWS = 2**24


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


def make_row(
    *,
    backbone: str,
    classifier: str,
    labels: str,
    correct: Tensor,
    splits: Sequence[str],
    **more: Any,
) -> Row:
    """A row in the schema of `lowshot.json`.

    Args:
        backbone: `msn`, `random`, `pixels` or what the user called it.
        classifier: one of `CLASSIFIERS`.
        labels: `1`, `2`, `5`, `1%`, `all`, ...
        correct: whether each test image was classified rightly, for every split, bool [S, m].
        splits: names of the label sets, S of them.
        more: further plain values; `lambda_` is written as `lambda`, null where there is none.
    """
    top1 = correct.double().mean(dim=1)
    low, high = bootstrap_interval(correct)
    strength = more.pop("lambda_", None)
    return {
        "backbone": backbone,
        "classifier": classifier,
        "labels": labels,
        "splits": len(top1),
        "top1_mean": float(top1.mean()),
        "top1_std": float(top1.std()) if len(top1) > 1 else 0.0,
        "lambda": strength,
        "top1": [float(value) for value in top1],
        "interval": [low, high],
        "split_names": list(splits),
        "test_images": correct.shape[1],
        **more,
    }


def bootstrap_interval(correct: Tensor) -> tuple[float, float]:
    """95 % interval of the mean accuracy when the test images are drawn anew.

    Only test images are resampled; what the choice of labelled images adds is `top1_std`.

    Args:
        correct: [S, m]; a test image counts by its mean over the S splits.

    Returns:
        Lower and upper quantile of 1,000 seeded resamples, fractions.
    """
    scores = correct.double().mean(dim=0).cpu()
    count = len(scores)
    generator = torch.Generator().manual_seed(0)
    means = []
    at_once = max(1, _MAX_DRAWS // count)
    for begin in range(0, _RESAMPLES, at_once):
        shape = (min(at_once, _RESAMPLES - begin), count)
        means.append(scores[torch.randint(count, shape, generator=generator)].mean(dim=1))
    tail = (1 - _CONFIDENCE) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def printable(name: str) -> str:
    """A name for tables and pictures: what cannot be printed becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def table_key(row: Row) -> tuple[str, str, str]:
    """What tells a row from the others of its backbone: classifier, labels, variant."""
    return row["classifier"], row["labels"], str(row.get("variant", ""))
