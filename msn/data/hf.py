"""Hugging Face data sets: `save_to_disk`, parquet and arrow files, or a name on the Hub.

The rows stay in memory-mapped files that all workers share. No code of a data set runs: `datasets`
has not run any since version 4.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from msn.data.layout import HELD_OUT, TRAIN, UNLABELLED
from msn.data.lists import Columns
from msn.data.sources import Source
from msn.errors import UserError
from msn.images.kinds import BadImageError, read_file

log = logging.getLogger(__name__)

# Names of columns in lower case; the first that exists is taken.
_IMAGE = ("image", "img", "picture", "photo", "pixel_values")
_LABEL = ("label", "labels", "class", "fine_label", "category", "target")
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes
_SHOWN = 12  # columns that a message names


@dataclass(eq=False, kw_only=True)
class HFSource(Source):
    """Rows of a `datasets.Dataset`."""

    where: str
    splits: dict[str, int]  # names of the splits and their rows; images are named after them
    images: Any  # the data set with one column, whose values are bytes, or a path, or both
    column: str  # that column
    labels: np.ndarray | None
    classes: list[str]
    why: str = ""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.images)

    def set_groups(self, names: np.ndarray) -> None:
        """The name of each row's group, [n]."""
        found, self.groups = np.unique(names, return_inverse=True)
        self.group_names = found.tolist()

    def name(self, i: int) -> str:
        """Split and number of the row."""
        for split, count in self.splits.items():
            if i < count:
                return f"{split}/{i}"
            i -= count
        raise IndexError(i)

    def identity(self, i: int) -> str:
        """Fingerprint of the rows (of `datasets`) and the number."""
        return f"{self.images._fingerprint} {i}"

    def read(self, i: int) -> bytes:
        """The bytes of the image in row i."""
        value = self.images[i][self.column]
        if isinstance(value, Mapping):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if value is None:
            raise BadImageError("the row has no image")
        return value if isinstance(value, bytes) else read_file(value)


class _Labels(NamedTuple):
    """Class numbers, -1 where a row has none, their names, and why there are none."""

    labels: np.ndarray | None
    classes: list[str]
    why: str


def hf_sources(
    root: str, val_root: str | None, *, columns: Columns, use_labels: bool
) -> tuple[HFSource, HFSource | None]:
    """Open the training images and the held-out images of a data set.

    The split `train`, or the only one, trains. `val_root` names the held-out split, or another data
    set; without it the first of `val`, `valid`, `validation` and `test` with labels is held out.

    Args:
        root: a directory that `save_to_disk` wrote, a folder of parquet or arrow files or of
            images, one such file, or a name on the Hub, USER/NAME.
        val_root: as set.
        columns: names of columns as set.
        use_labels: False ignores the labels.

    Raises:
        UserError: `datasets` is not installed, there is no such data set, it has no column of
            images or several, or its labels are not classes.
    """
    splits = _open(root, key="data.root")
    trained = TRAIN if TRAIN in splits else next(iter(splits))
    if TRAIN not in splits and len(splits) > 1:
        raise UserError(f"data.root={root}: none of its splits is train: {', '.join(splits)}")

    def source(where: str, name: str, rows: Any) -> HFSource:
        return _source(where, name, rows, columns, use_labels)

    train = source(root, trained, splits[trained])
    if val_root is not None:
        if val_root in splits and val_root != trained:
            return train, source(f"{root}:{val_root}", val_root, splits[val_root])
        others = _open(val_root, key="data.val_root")
        name = next((name for name in HELD_OUT if name in others), next(iter(others)))
        return train, source(val_root, name, others[name])
    for name in HELD_OUT:
        if name in splits and name != trained:
            held_out = source(f"{root}:{name}", name, splits[name])
            if held_out.labels is not None or not use_labels:
                log.info("%s: trains on the split %s and holds %s out", root, trained, name)
                return train, held_out
    return train, None


def hf_whole(root: str, *, columns: Columns, use_labels: bool) -> HFSource:
    """The rows of all splits, one behind the other; arguments and errors as of `hf_sources`."""
    splits = {name: rows for name, rows in _open(root, key="data.root").items() if len(rows)}
    if not splits:
        raise UserError(f"data.root={root}: has no rows")
    parts = [_source(root, name, rows, columns, use_labels) for name, rows in splits.items()]
    from datasets import concatenate_datasets

    try:
        images = concatenate_datasets([part.images for part in parts])
    except ValueError as error:  # columns of other names or kinds
        raise UserError(f"data.root={root}: its splits differ ({_first_line(error)})") from error
    classes = list(dict.fromkeys(name for part in parts for name in part.classes))
    labels = [
        np.full(len(part), UNLABELLED)
        if part.labels is None
        else np.array([*map(classes.index, part.classes), UNLABELLED])[part.labels]
        for part in parts
    ]
    whole = HFSource(
        where=root,
        splits={name: len(rows) for name, rows in splits.items()},
        images=images,
        column=parts[0].column,
        labels=np.concatenate(labels) if classes else None,
        classes=classes,
        why=parts[0].why,
    )
    if columns.group is not None:
        names = [np.array(part.group_names)[part.groups] for part in parts]
        whole.set_groups(np.concatenate(names))
    return whole


def _open(root: str, *, key: str) -> Mapping[str, Any]:
    """All splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{key}={root}: data=hf needs `pip install 'msn-pretraining[hf]'` ({error})"
        ) from error
    from datasets import disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    ending = os.path.splitext(root)[1].lower()
    if os.path.isfile(root) and ending not in (".parquet", ".arrow"):
        raise UserError(f"{key}={root}: a file must be .parquet or .arrow")
    if not os.path.exists(root):
        _ask_hub(root, key)
    try:
        if os.path.isfile(root):
            found = load_dataset(ending[1:], data_files=root)
        elif any(os.path.isfile(os.path.join(root, name)) for name in SAVED):
            found = load_from_disk(root)
        else:
            found = load_dataset(root)
    except Exception as error:  # readers of foreign bytes and of the network raise anything
        raise UserError(f"{key}={root}: datasets cannot open it ({_first_line(error)})") from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {TRAIN: found}


def _ask_hub(name: str, key: str) -> None:
    """Refuse at once what is not on the Hub; `datasets` would try for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"{key}={name}: no such file or folder, and no name on the Hub (USER/NAME)")
    try:
        HfApi().dataset_info(name, timeout=10)
    except OfflineModeIsEnabled:
        return  # its cache may hold it
    except Exception as error:  # of the network: anything
        raise UserError(
            f"{key}={name}: no such folder, and the Hub does not give it ({_first_line(error)}); "
            "HF_HUB_OFFLINE=1 takes what an earlier run fetched"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _source(where: str, split: str, rows: Any, columns: Columns, use_labels: bool) -> HFSource:
    from datasets import Image

    if not len(rows):
        raise UserError(f"{where}: the split {split} has no rows")
    image = columns.image or _find_image(where, rows.features)
    _check_there("data.image_column", image, where, rows.features)
    images = rows.select_columns([image])
    if not _is_bytes(images.features[image]):
        images = images.cast_column(image, Image(decode=False))
    found = _Labels(None, [], "data.use_labels=false")
    if use_labels:
        found = _read_labels(where, rows, columns.label)
    images, splits = images.with_format(None), {split: len(rows)}
    source = HFSource(where=where, splits=splits, images=images, column=image, **found._asdict())
    if columns.group is not None:
        _check_there("data.group", columns.group, where, rows.features)
        values = rows.select_columns([columns.group]).with_format("arrow")[:][columns.group]
        if values.null_count:
            raise UserError(f"data.group={columns.group}: a row of {where} has no group")
        source.set_groups(np.asarray(values).astype(str))
    return source


def _find_image(where: str, features: Mapping[str, Any]) -> str:
    from datasets import Image

    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    lower = {name.lower(): name for name in features}
    named = [
        lower[name] for name in _IMAGE if name in lower and _may_be_image(features, lower[name])
    ]
    if len(typed) == 1:
        return typed[0]
    if named:
        return named[0]
    what = f"several columns of images ({', '.join(typed)})" if typed else "no column of images"
    raise UserError(f"{where}: {what}; data.image_column=NAME chooses; {_seen(features)}")


def _may_be_image(features: Mapping[str, Any], name: str) -> bool:
    """Whether it holds bytes, or bytes and path as in plain parquet files."""
    from datasets import Image

    feature = features[name]
    pair = isinstance(feature, Mapping) and {"bytes", "path"} <= set(feature)
    return isinstance(feature, Image) or pair or _is_bytes(feature)


def _is_bytes(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _check_there(key: str, name: str, where: str, features: Mapping[str, Any]) -> None:
    if name not in features:
        raise UserError(f"{key}={name}: {where} has no such column; {_seen(features)}")


def _seen(features: Mapping[str, Any]) -> str:
    shown = []
    for name, feature in list(features.items())[:_SHOWN]:
        kind = type(feature).__name__
        shown.append(f"{name} ({_kind(feature) if kind == 'Value' else kind})")
    return f"columns seen: {', '.join(shown)}"


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__)).split("(")[0]


def _read_labels(where: str, rows: Any, column: str | None) -> _Labels:
    from datasets import ClassLabel

    features = rows.features
    column = column or _find_label(where, features)
    if column is None:
        return _Labels(None, [], f"no column of labels; data.label_column=NAME; {_seen(features)}")
    _check_there("data.label_column", column, where, features)
    feature = features[column]
    kind = _kind(feature)
    if not kind.startswith(("int", "uint", "bool", "string", "large_string")):
        raise UserError(
            f"{where}: the column {column} ({kind}) holds no classes; data.label_column=NAME "
            f"chooses another, data.use_labels=false none; {_seen(features)}"
        )
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    known = ~np.asarray(values.is_null())
    if isinstance(feature, ClassLabel):
        labels = np.asarray(values.fill_null(UNLABELLED)).astype(np.int64)
        classes = list(feature.names)
    else:
        found, inverse = np.unique(np.asarray(values.drop_null()), return_inverse=True)
        labels = np.full(len(rows), UNLABELLED, np.int64)
        labels[known] = inverse
        classes = [str(value) for value in found.tolist()]
    if not (labels != UNLABELLED).any():
        return _Labels(None, [], f"no row has a value in the column {column}")
    if len(np.unique(labels[labels != UNLABELLED])) < 2:
        why = f"all rows have one class in the column {column}, and two are needed"
        return _Labels(None, [], why)
    return _Labels(labels, classes, "")


def _find_label(where: str, features: Mapping[str, Any]) -> str | None:
    from datasets import ClassLabel

    lower = {name.lower(): name for name in features}
    named = [lower[name] for name in _LABEL if name in lower]
    typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if named or not typed:
        return named[0] if named else None
    if len(typed) > 1:
        raise UserError(
            f"{where}: several columns of classes ({', '.join(typed)}); "
            "data.label_column=NAME chooses"
        )
    return typed[0]
