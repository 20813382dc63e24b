"""Augmented images for probes and fine-tuning: a view depends on seed, epoch and image alone."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from msn.data.sampler import counter_hash, permutation
from msn.data.workers import make_loader
from msn.errors import UserError
from msn.evaluation.features import LabelledSet, Runtime, is_replaced

log = logging.getLogger(__name__)

_ORDER, _VIEW = 6, 7  # keep these draws apart


class AugmentedImages(Dataset[tuple[Tensor, int, bool]]):
    """Views of one epoch with labels, the same with any number of workers.

    Args:
        images: labelled images.
        transform: draws from the global generators of torch, numpy and Python.
        seed: of the draws.
        epoch: likewise.
    """

    def __init__(
        self,
        images: LabelledSet,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int,
        epoch: int,
    ) -> None:
        self.images, self.transform = images, transform
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, bool]:
        """The view and label of image i, and whether another image replaces it."""
        with seeded(self.seed, _VIEW, self.epoch, i):
            image = self.images[i]
            view = self.transform(image)
        return view, int(self.images.labels[i]), is_replaced(image)


def timm_views(
    image_size: int, *, scale: Sequence[float], auto_augment: str | None, **more: Any
) -> Callable[[Image.Image], Tensor]:
    """timm's training transform, bicubic, without colour jitter; `more` are its own arguments."""
    least, greatest = scale
    transform: Compose = create_transform(
        image_size,
        is_training=True,
        scale=(least, greatest),
        color_jitter=0.0,
        auto_augment=auto_augment,
        interpolation="bicubic",
        re_mode="pixel",
        **more,
    )
    for step in transform.transforms:
        for operation in getattr(step, "ops", []):
            if operation.name.startswith("Posterize"):
                # timm asks for 0 bits at the strongest level, which Pillow >= 13 refuses.
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
    return transform


def check_policy(name: str) -> None:
    """Let timm parse a policy now rather than when the first image is looked at.

    Raises:
        UserError: it cannot.
    """
    try:
        transform: Compose = create_transform(32, is_training=True, auto_augment=name)
        transform(Image.new("RGB", (32, 32)))
    except Exception as error:  # timm asserts, converts and looks up whatever the text says
        raise UserError(
            f"protocol.recipe.auto_augment={name}: must be a policy of timm such as "
            "rand-m9-mstd0.5-inc1, augmix-m3 or original, or null"
        ) from error


def _at_least_one_bit(
    bits: Callable[[float, dict[str, Any]], tuple[int]], level: float, settings: dict[str, Any]
) -> tuple[int]:
    return (max(1, bits(level, settings)[0]),)


def epoch_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """A seeded order of range(count) in full batches; the rest is left out of this epoch."""
    order = permutation(count, seed, _ORDER, epoch).tolist()
    return [order[at : at + batch_size] for at in range(0, count - batch_size + 1, batch_size)]


def in_pieces(batch: Sequence[int], size: int) -> list[list[int]]:
    """A batch in pieces of at most `size`."""
    return [list(batch[at : at + size]) for at in range(0, len(batch), size)]


def training_pieces(
    images: LabelledSet,
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int,
    piece_size: int,
    seed: int,
    epoch: int,
    runtime: Runtime,
    replaced: set[int],
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """This process's share of every batch of an epoch, in pieces of views and labels.

    Args:
        images: labelled images.
        transform: of each image, see `AugmentedImages`.
        batch_size: images per batch over all processes.
        piece_size: images per piece, at most.
        seed: of order and views.
        epoch: likewise.
        runtime: devices, workers, processes.
        replaced: gets the numbers of the images that others replace.

    Returns:
        For each batch its pieces, which must all be consumed before the next batch.
    """
    views = AugmentedImages(images, transform, seed=seed, epoch=epoch)
    batches = [
        in_pieces(batch[runtime.rank :: runtime.world], piece_size)
        for batch in epoch_batches(len(images), batch_size, seed=seed, epoch=epoch)
    ]
    loader = iter(
        make_loader(
            views,
            batch_sampler=[piece for pieces in batches for piece in pieces],
            num_workers=runtime.num_workers,
            pin_memory=runtime.devices[0].type == "cuda",
        )
    )

    def take(pieces: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        for piece in pieces:
            seen, labels, others = next(loader)
            replaced.update(i for i, other in zip(piece, others.tolist(), strict=True) if other)
            yield seen, labels

    for pieces in batches:
        yield take(pieces)


def warn_of_idle(runtime: Runtime, what: str) -> None:
    """Warn if training on images leaves all devices but the first idle."""
    if len(runtime.devices) > 1:
        log.warning(
            "%s uses one of %d devices of a process: start it with torchrun --nproc-per-node=%d",
            what,
            len(runtime.devices),
            len(runtime.devices),
        )


def over_processes(found: set[int], runtime: Runtime) -> set[int]:
    """Union of what all processes that share the work have found."""
    if not runtime.shared:
        return found
    gathered: list[set[int]] = [set() for _ in range(runtime.world)]
    dist.all_gather_object(gathered, found)
    return set().union(*gathered)


@contextmanager
def seeded(*coordinates: int, device: torch.device | None = None) -> Iterator[None]:
    """Within, draws of torch, numpy and Python are seeded; then their generators are restored.

    Args:
        coordinates: what the draws depend on.
        device: an accelerator whose generator is seeded too; None seeds only the CPU's.
    """
    seed = int(counter_hash(*coordinates)[0] % 2**32)
    python, numbers, state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        with _seeded_device(seed, device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(state)


@contextmanager
def _seeded_device(seed: int, device: torch.device | None) -> Iterator[None]:
    if device is None or device.type == "cpu":
        yield
        return
    module, where = torch.get_device_module(device), () if device.type == "mps" else (device,)
    before = module.get_rng_state(*where)
    module.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), *where)
    try:
        yield
    finally:
        module.set_rng_state(before, *where)
