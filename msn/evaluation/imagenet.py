"""ImageNet-1k as in the paper: its label lists and its figures (arXiv 2204.07141, Tables 1-4).

The lists have the licence of the reference repository, so they are not shipped: they are read from
a directory, or fetched once and checked.
"""

import hashlib
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from msn.data.subsets import positions_of, read_names
from msn.data.tables import cache_folder
from msn.errors import UserError
from msn.evaluation.features import LabelledSet
from msn.evaluation.sets import LabelSet
from msn.files import write_bytes

log = logging.getLogger(__name__)

REPOSITORY = "https://raw.githubusercontent.com/facebookresearch/msn/main"
ONE_PERCENT = "1%"
_TIMEOUT_S = 60


class OfficialList(NamedTuple):
    """One list of the reference repository."""

    labels: str
    """`1`, `2`, `5` images per class, or `1%`."""
    split: int
    file: str
    sha256: str

    @property
    def path(self) -> str:
        """Its path in the reference repository."""
        return f"imagenet_subsets{self.split}/{self.file}"


_DIGESTS = {
    ("1", 1): "ffa4f960419ce75479a2af80d632c7a98756b624aad2399a334a3549584ab426",
    ("1", 2): "7f13beaba20a6e6413cc98bcaefb084961d4c7f1938a3b7e2f20464d5575cf43",
    ("1", 3): "d77d56527da4842b96a7bbbc14f846c4e637a95b43df592e11770d26997b5b5f",
    ("2", 1): "9b0c2d1957ad7a1135773a868afbaeaa6d50d30b4ec54d1b0bf759879a3c0933",
    ("2", 2): "35b93fb0d809b17a30420a507b2fd356f22152671567f4b9704735e1e379b440",
    ("2", 3): "400ae5a31e01bc1a034c392c2bdbdfaab45699dc4f59392e65acfcaae172cf1b",
    ("5", 1): "f8daf7e637fafe92e7567016db43e6db2c816f7bbf8ce60f5cf59c0788f12890",
    ("5", 2): "284603d071f36b298c893d2df8fda2d1a110f680a25d0f8b1faa9acea20fcc04",
    ("5", 3): "eaab6e72d1ea83c3624f5d28a8c217568ea138ea7c5cacfa0cdcd206b5fd8e24",
    (ONE_PERCENT, 1): "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
}
_OTHER_NAMES = {
    ("5", 3): "3imgs_class.txt",  # misnamed: it has five images per class
    (ONE_PERCENT, 1): "1percent.txt",
}
OFFICIAL_LISTS = tuple(
    OfficialList(*key, _OTHER_NAMES.get(key, f"{key[0]}imgs_class.txt"), digest)
    for key, digest in _DIGESTS.items()
)


def official_sets(
    directory: Path | None, train: LabelledSet, *, shots: Sequence[int], one_percent: bool
) -> list[LabelSet]:
    """The official label sets within a training pool, ordered by size, then split.

    Args:
        directory: with `splitN/` or `imagenet_subsetsN/`; None fetches what the cache lacks.
        train: ImageNet's training images, or any images with the listed names.
        shots: which of 1, 2, 5 images per class.
        one_percent: whether to include the 1 % list.

    Raises:
        UserError: a list is missing or cannot be fetched, names images or classes that are not
            there, or does not have k images of every class.
    """
    lists = find_lists(directory, shots=shots, one_percent=one_percent)
    # Building the names of 1.28 million images once is enough.
    names, sets = train.names, []
    for entry, path in lists:
        listed = read_names(path)
        positions = positions_of(listed, names, classes=train.classes, where=str(path))
        found = LabelSet(entry.labels, f"split {entry.split}", positions)
        _check_balance(found, train, path)
        sets.append(found)
    return sets


def find_lists(
    directory: Path | None, *, shots: Sequence[int], one_percent: bool
) -> list[tuple[OfficialList, Path]]:
    """Where each official list is, see `official_sets`.

    Raises:
        UserError: a list is missing or cannot be fetched.
    """
    lists = _wanted(shots, one_percent)
    if directory is None:
        directory = fetch_lists(cache_folder() / "imagenet_subsets", lists)
    return [(entry, find_list(directory, entry)) for entry in lists]


def are_the_papers(directory: Path, *, shots: Sequence[int], one_percent: bool) -> bool:
    """Whether the lists of a directory are the paper's, byte for byte; the log names others."""
    others = []
    for entry, path in find_lists(directory, shots=shots, one_percent=one_percent):
        if _digest(path.read_bytes()) != entry.sha256:
            others.append(str(path))
    if others:
        log.warning(
            "%d lists are not those of the paper, so its figures are left out (their SHA-256 "
            "differs; first: %s)",
            len(others),
            others[0],
        )
    return not others


def _wanted(shots: Sequence[int], one_percent: bool) -> list[OfficialList]:
    wanted = {*map(str, shots), *([ONE_PERCENT] if one_percent else [])}
    return [entry for entry in OFFICIAL_LISTS if entry.labels in wanted]


def find_list(directory: Path, entry: OfficialList) -> Path:
    """Find a list below a directory, under any of the names in use.

    Raises:
        UserError: the directory or the list does not exist.
    """
    if not directory.is_dir():
        raise UserError(f"protocol.lists_dir={directory}: there is no such directory")
    files = dict.fromkeys((entry.file, f"{entry.labels}imgs_class.txt"))
    folders = (f"imagenet_subsets{entry.split}", f"split{entry.split}")
    candidates = [directory / folder / file for folder in folders for file in files]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"protocol.lists_dir={directory}: has neither {folders[0]}/{entry.file} nor "
        f"{folders[1]}/{entry.file}"
    )


def fetch_lists(directory: Path, lists: Sequence[OfficialList], *, url: str | None = None) -> Path:
    """Fetch the lists that a directory lacks, and check each against its digest.

    Args:
        directory: where they are kept, with the layout of the reference repository.
        lists: which ones.
        url: of the repository's files; None takes $MSN_SUBSETS_URL, else GitHub.

    Returns:
        The directory.

    Raises:
        UserError: a list cannot be fetched, or is not the paper's.
    """
    url = (url or os.environ.get("MSN_SUBSETS_URL") or REPOSITORY).rstrip("/")
    for entry in lists:
        path = directory / entry.path
        if path.is_file() and _digest(path.read_bytes()) == entry.sha256:
            continue
        source = f"{url}/{entry.path}"
        log.info("fetching %s", source)
        try:
            with urllib.request.urlopen(source, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                content = answer.read()
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"cannot fetch {source} ({reason}); give protocol.lists_dir=DIR with the lists"
            ) from error
        if _digest(content) != entry.sha256:
            raise UserError(f"{source}: is not the list of the paper (its SHA-256 differs)")
        write_bytes(path, content)
    return directory


def _check_balance(found: LabelSet, train: LabelledSet, path: Path) -> None:
    """k images of every class, or at least one of each in the 1 % list."""
    counts = torch.bincount(train.labels[found.positions], minlength=len(train.classes))
    want = None if found.labels == ONE_PERCENT else int(found.labels)
    wrong = counts == 0 if want is None else counts != want
    if bool(wrong.any()):
        label = int(torch.nonzero(wrong)[0, 0])
        raise UserError(
            f"{path}: {int(counts[label])} images of class {train.classes[label]}, must be "
            f"{'at least 1' if want is None else want}"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


IMAGENET_CLASSES = 1000


class PaperFigure(NamedTuple):
    """A published accuracy."""

    model: str
    top1: float
    """Fraction."""
    std: float | None
    """Over the three splits; None where there is one."""


# (embed_dim, depth, patch_size) of each model.
_MODELS = {
    (384, 12, 16): "ViT-S/16",
    (768, 12, 16): "ViT-B/16",
    (768, 12, 8): "ViT-B/8",
    (768, 12, 4): "ViT-B/4",
    (1024, 24, 7): "ViT-L/7",
}
_FIGURES: dict[str, dict[tuple[str, str], tuple[float, float | None]]] = {
    "ViT-S/16": {
        ("logistic", "1"): (0.471, 0.001),
        ("logistic", "2"): (0.558, 0.006),
        ("logistic", "5"): (0.628, 0.003),
        ("logistic", "1%"): (0.672, None),
        ("linear", "all"): (0.769, None),
    },
    "ViT-B/16": {
        ("logistic", "1"): (0.498, 0.002),
        ("logistic", "2"): (0.589, 0.004),
        ("logistic", "5"): (0.655, 0.003),
        ("logistic", "1%"): (0.695, None),
        ("finetune", "all"): (0.834, None),
    },
    "ViT-B/8": {
        ("logistic", "1"): (0.551, 0.001),
        ("logistic", "2"): (0.649, 0.007),
        ("logistic", "5"): (0.716, 0.003),
    },
    "ViT-B/4": {
        ("logistic", "1"): (0.543, 0.004),
        ("logistic", "2"): (0.646, 0.007),
        ("logistic", "5"): (0.724, 0.003),
        ("logistic", "1%"): (0.757, None),
    },
    "ViT-L/7": {
        ("logistic", "1"): (0.571, 0.006),
        ("logistic", "2"): (0.664, 0.006),
        ("logistic", "5"): (0.721, 0.002),
        ("logistic", "1%"): (0.751, None),
        ("linear", "all"): (0.807, None),
    },
}


# Masked autoencoders: low-shot rows of the MSN paper; fine-tuning and linear probe of arXiv
# 2111.06377, Table 3 and section 4.3.
_MAE_MODELS = {(768, 12, 16): "ViT-B/16", (1024, 24, 16): "ViT-L/16", (1280, 32, 14): "ViT-H/14"}
_MAE_FIGURES: dict[str, dict[tuple[str, str], tuple[float, float | None]]] = {
    "ViT-B/16": {("finetune", "all"): (0.836, None), ("linear", "all"): (0.680, None)},
    "ViT-L/16": {
        ("logistic", "1"): (0.123, None),
        ("logistic", "2"): (0.193, None),
        ("logistic", "5"): (0.423, None),
        ("finetune", "all"): (0.859, None),
        ("linear", "all"): (0.758, None),
    },
    "ViT-H/14": {("finetune", "all"): (0.869, None), ("linear", "all"): (0.766, None)},
}
_PUBLISHED = {"msn": (_MODELS, _FIGURES), "mae": (_MAE_MODELS, _MAE_FIGURES)}


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether class names are those of ImageNet-1k: a thousand WordNet ids."""
    return len(classes) == IMAGENET_CLASSES and all(
        re.fullmatch(r"n\d{8}", name) for name in classes
    )


def paper_figure(
    model: Mapping[str, int | float], classifier: str, labels: str, method: str = "msn"
) -> PaperFigure | None:
    """The published figure for an architecture on ImageNet-1k, None if there is none.

    Args:
        model: the six numbers of `VisionTransformer`.
        classifier: `logistic`, `linear`, `finetune` or `knn`.
        labels: `1`, `2`, `5`, `1%` or `all`.
        method: of pretraining, `msn` or `mae`.
    """
    models, figures = _PUBLISHED[method]
    name = models.get((int(model["embed_dim"]), int(model["depth"]), int(model["patch_size"])))
    found = figures.get(name, {}).get((classifier, labels)) if name else None
    return None if name is None or found is None else PaperFigure(name, *found)
