"""The recipe of fine-tuning (paper A.4), in timm's parts."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor
from torchvision.transforms import Compose

from msn.errors import UserError
from msn.evaluation.backbones import FrozenBackbone


class Recipe:
    """Hyper-parameters of fine-tuning (paper A.4).

    Args:
        epochs: over the labelled images, >= 1.
        batch_size: images a step over all processes, even, >= 2; the number of labelled images,
            rounded down to even, where that is less.
        lr: peak of the last layer's learning rate, for this batch size, > 0.
        min_lr: at the end of the cosine, >= 0.
        warmup_epochs: of a linear warm-up from 0, in [0, epochs).
        weight_decay: of AdamW, >= 0; not on one-dimensional parameters, class token and position
            embeddings.
        layer_decay: factor of the learning rate from each layer to the one below, in (0, 1].
        drop_path: of the last block, growing linearly from 0, in [0, 1).
        mixup: alpha, 0 for none.
        cutmix: alpha, 0 for none.
        label_smoothing: in [0, 1).
        auto_augment: a policy in timm's words, `rand-m9-mstd0.5-inc1` is RandAugment (9, 0.5);
            None for none.
        random_erasing: probability in [0, 1].
        crop_scale: area of random crops relative to the image, two numbers in (0, 1].
        flip: probability of a horizontal flip, in [0, 1].

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        min_lr: float,
        warmup_epochs: float,
        weight_decay: float,
        layer_decay: float,
        drop_path: float,
        mixup: float,
        cutmix: float,
        label_smoothing: float,
        auto_augment: str | None,
        random_erasing: float,
        crop_scale: list[float],
        flip: float,
    ) -> None:
        wrong = {
            "epochs >= 1": epochs < 1,
            "batch_size even and >= 2": batch_size < 2 or batch_size % 2,
            "lr > 0 and min_lr >= 0": not lr > 0 or not min_lr >= 0,
            "warmup_epochs in [0, epochs)": not 0 <= warmup_epochs < epochs,
            "weight_decay >= 0": not weight_decay >= 0,
            "layer_decay in (0, 1]": not 0 < layer_decay <= 1,
            "drop_path in [0, 1)": not 0 <= drop_path < 1,
            "mixup and cutmix >= 0": mixup < 0 or cutmix < 0,
            "label_smoothing in [0, 1)": not 0 <= label_smoothing < 1,
            "random_erasing and flip in [0, 1]": not (0 <= random_erasing <= 1 and 0 <= flip <= 1),
            "crop_scale two rising numbers in (0, 1]": len(crop_scale) != 2
            or not 0 < crop_scale[0] <= crop_scale[1] <= 1,
        }
        for rule, broken in wrong.items():
            if broken:
                raise UserError(f"protocol.recipe needs {rule}")
        if auto_augment is not None:
            _check_policy(auto_augment)
        self.epochs, self.batch_size = epochs, batch_size
        self.lr, self.min_lr, self.warmup_epochs = lr, min_lr, warmup_epochs
        self.weight_decay, self.layer_decay, self.drop_path = weight_decay, layer_decay, drop_path
        self.mixup, self.cutmix, self.label_smoothing = mixup, cutmix, label_smoothing
        self.auto_augment, self.random_erasing = auto_augment, random_erasing
        self.crop_scale, self.flip = (crop_scale[0], crop_scale[1]), flip

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Warm-up, then cosine, at the middle of a step (from 0)."""
        at, warmup = step + 0.5, self.warmup_epochs * steps_per_epoch
        if at < warmup:
            return self.lr * at / warmup
        progress = (at - warmup) / (self.epochs * steps_per_epoch - warmup)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def transform(self, subject: FrozenBackbone) -> Callable[[Image.Image], Tensor]:
        """timm's training transform."""
        transform: Compose = create_transform(
            subject.image_size,
            is_training=True,
            scale=self.crop_scale,
            hflip=self.flip,
            color_jitter=0.0,
            auto_augment=self.auto_augment,
            interpolation="bicubic",
            re_prob=self.random_erasing,
            re_mode="pixel",
            mean=subject.mean,
            std=subject.std,
        )
        for step in transform.transforms:
            for operation in getattr(step, "ops", []):
                if operation.name.startswith("Posterize"):
                    # timm asks for 0 bits at the strongest level, which Pillow >= 13 refuses.
                    operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
        return transform

    def mixture(self, num_classes: int) -> Mixup | None:
        """timm's mixup and cutmix, which smooth labels as well; None where both are off."""
        if self.mixup == 0 and self.cutmix == 0:
            return None
        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            label_smoothing=self.label_smoothing,
            num_classes=num_classes,
        )


def _check_policy(name: str) -> None:
    """Let timm parse a policy now rather than when the first image is looked at."""
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
