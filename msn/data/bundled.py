"""Sources that come with other packages: scikit-learn's digits, and torchvision's small sets."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from msn.data.sources import ArraySource
from msn.errors import UserError

_TORCHVISION = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def digits_source(image_size: int) -> ArraySource:
    """Load the 1,797 handwritten digits that ship with scikit-learn, upsampled to RGB.

    Args:
        image_size: side in px to which the 8 x 8 px originals are upsampled (bicubic).
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=(image_size, image_size), mode="bicubic")
    gray = large.round().clamp(0, 255).to(torch.uint8).numpy()
    pixels = np.ascontiguousarray(
        np.broadcast_to(gray.transpose(0, 2, 3, 1), (*gray[:, 0].shape, 3))
    )
    labels = digits.target.astype(np.int64)
    return ArraySource(
        where="digits", pixels=pixels, labels=labels, classes=[str(i) for i in range(10)]
    )


def torchvision_source(name: str, root: str, *, split: str, download: bool) -> ArraySource:
    """Load CIFAR-10, CIFAR-100 or STL-10 through torchvision.

    Args:
        name: `cifar10`, `cifar100` or `stl10`.
        root: the folder in which torchvision keeps it.
        split: `train` or `test`; STL-10 also has `unlabeled`.
        download: whether torchvision may fetch it.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        if name == "stl10":
            stl = STL10(root, split=split, download=download)
            pixels = np.ascontiguousarray(stl.data.transpose(0, 2, 3, 1))
            labels, classes = stl.labels.astype(np.int64), list(stl.classes)
        else:
            cifar = _TORCHVISION[name](root, train=split == "train", download=download)
            pixels = cifar.data
            labels, classes = np.array(cifar.targets, np.int64), list(cifar.classes)
    except (RuntimeError, OSError) as error:
        if download:
            raise UserError(f"data.root={root}: {name} could not be fetched ({error})") from error
        raise UserError(
            f"data.root={root}: no {name} here as torchvision keeps it (data.download=true fetches)"
        ) from error
    unlabelled = split == "unlabeled"
    return ArraySource(
        where=f"{name}/{split}",
        pixels=pixels,
        labels=None if unlabelled else labels,
        classes=[] if unlabelled else classes,
    )
