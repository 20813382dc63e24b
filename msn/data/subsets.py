"""Label sets: k images per class, a share of each class, or a list of names.

Lists are text files with one name per line, the form of the published ImageNet lists.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from msn.data.sampler import permutation
from msn.errors import UserError
from msn.files import write_bytes

_SUBSET = 4  # keeps these draws apart from those of order, views and the held-out split
_NAMED = 5  # missing names that a message lists

SHORT_CLASSES = ("refuse", "take_all", "leave_out")


def k_shot(
    labels: Tensor,
    shots: Sequence[int],
    *,
    seed: int,
    classes: Sequence[str],
    short: str = "refuse",
) -> dict[int, Tensor]:
    """Draw nested label sets with k images per class: that of 1 is part of that of 2, and so on.

    Args:
        labels: class numbers, [n].
        shots: numbers of images per class, each >= 1.
        seed: of the draw.
        classes: names of all classes.
        short: treatment of a class with fewer than k images: `refuse`, `take_all` of them, or
            `leave_out` the class.

    Returns:
        For each k its sorted positions in `labels`, [k * classes] where no class is short.

    Raises:
        UserError: a class has too few images, there is a single class, or k < 1.
    """
    for k in shots:
        if k < 1:
            raise UserError(f"shots must be >= 1, got {k}")
    order = _order_in_classes(labels, seed, classes)
    for name, members in zip(classes, order, strict=True):
        if len(members) < max(shots) and short == "refuse":
            raise UserError(
                f"shots={max(shots)}: class {name} has only {len(members)} images to label; "
                "protocol.short_classes=take_all takes these, leave_out does without the class"
            )
    found = {}
    for k in shots:
        left = [m for m in order if len(m) >= (k if short == "leave_out" else 1)]
        if len(left) < 2:
            raise UserError(f"shots={k}: fewer than two classes have as many images to label")
        found[k] = torch.cat([members[:k] for members in left]).sort().values
    return found


def fraction_of_each_class(
    labels: Tensor, fraction: float, *, seed: int, classes: Sequence[str]
) -> Tensor:
    """Draw a share of every class, at least one image of each; smaller shares are nested in larger.

    Args:
        labels: class numbers, [n].
        fraction: in (0, 1].
        seed: of the draw.
        classes: names of all classes.

    Returns:
        Sorted positions in `labels`.

    Raises:
        UserError: the fraction is out of range, a class has no image, or there is a single class.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction must be in (0, 1], got {fraction}")
    chosen = []
    for name, members in zip(classes, _order_in_classes(labels, seed, classes), strict=True):
        if len(members) == 0:
            raise UserError(f"fraction={fraction}: class {name} has no image to label")
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return torch.cat(chosen).sort().values


def read_names(path: Path) -> list[str]:
    """Read a list of image names, one per line; blank lines are skipped.

    Raises:
        UserError: the file is missing, unreadable or empty, or lists an image twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path}: cannot read this list ({error.strerror or error})") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path}: lists no image")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: lists an image twice: {_some(twice)}")
    return names


def write_names(path: Path, names: Sequence[str]) -> None:
    """Write a list that `read_names` reads, all or nothing."""
    text = "".join(f"{name}\n" for name in names)
    write_bytes(path, text.encode(errors="surrogateescape"))


def positions_of(
    listed: Sequence[str], names: Sequence[str], *, classes: Sequence[str], where: str
) -> Tensor:
    """The sorted positions of listed images in a data set, [len(listed)]; see `places_of`."""
    return torch.tensor(places_of(listed, names, classes=classes, where=where)).sort().values


def places_of(
    listed: Sequence[str], names: Sequence[str], *, classes: Sequence[str], where: str
) -> list[int]:
    """Find listed images in a data set, by full name or by file name alone.

    Args:
        listed: names of a list, e.g. `n01440764_10026.JPEG` or `train/cat/3.jpg`.
        names: names of the data set's images.
        classes: of the data set, to tell a missing class from a missing file.
        where: the list, for messages.

    Returns:
        Positions in `names`, in the order of `listed`.

    Raises:
        UserError: images or classes are missing (the first five are named), or a bare file name
            fits several images.
    """
    table = _by_name(names)
    missing = [name for name in listed if name not in table]
    if missing:
        gone = _missing_classes(missing, classes)
        if gone:
            raise UserError(
                f"{where}: {len(gone)} listed classes are not in the data: {_some(gone)}"
            )
        raise UserError(
            f"{where}: {len(missing)} of {len(listed)} listed images are not in the data: "
            f"{_some(missing)}"
        )
    ambiguous = [name for name in listed if table[name] < 0]
    if ambiguous:
        raise UserError(f"{where}: several images have a listed name: {_some(ambiguous)}")
    places = [table[name] for name in listed]
    if len(set(places)) < len(places):
        raise UserError(f"{where}: lists an image twice, by different names")
    return places


def _order_in_classes(labels: Tensor, seed: int, classes: Sequence[str]) -> list[Tensor]:
    """Positions of the images of every class in a seeded order."""
    if len(classes) < 2:
        found = ", ".join(classes) if classes else "none"
        raise UserError(f"labels: at least two classes are needed, found {found}")
    order = []
    for label in range(len(classes)):
        members = torch.nonzero(labels == label)[:, 0]
        order.append(members[torch.from_numpy(permutation(len(members), seed, _SUBSET, label))])
    return order


def _by_name(names: Sequence[str]) -> dict[str, int]:
    """Positions by full name and by file name; -1 if a file name fits several images."""
    table: dict[str, int] = {}
    for position, name in enumerate(names):
        bare = PurePosixPath(name).name
        table[bare] = -1 if bare in table else position
    table.update({name: position for position, name in enumerate(names)})
    return table


def _missing_classes(missing: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Classes of missing names (folder, or WordNet id before `_`) that the data lack."""
    known = set(classes)
    spoken = {PurePosixPath(name).parent.name or name.partition("_")[0] for name in missing}
    wordnet = {name for name in spoken if name[:1] == "n" and name[1:].isdigit()}
    folders = {PurePosixPath(name).parent.name for name in missing} - {""}
    return sorted((wordnet | folders) - known)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
