"""Fine-tuning the whole backbone with timm's parts (paper A.4): with all labels, or with few."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msn.data.workers import make_loader
from msn.errors import UserError
from msn.evaluation.augment import (
    check_policy,
    in_pieces,
    over_processes,
    seeded,
    timm_views,
    training_pieces,
    warn_of_idle,
)
from msn.evaluation.backbones import FrozenBackbone, Subject
from msn.evaluation.features import (
    FeatureSettings,
    LabelledSet,
    Runtime,
    TransformedImages,
    float32_products,
)
from msn.evaluation.heads import add_low_rank, average_patches, classifier_of
from msn.evaluation.lowshot import (
    LabelPlan,
    Protocol,
    check_draws,
    with_unreadable,
)
from msn.evaluation.outcomes import outcome_of
from msn.evaluation.sets import (
    ChosenImages,
    LabelSet,
    Result,
    all_labels,
    drawn_shares,
    drawn_shots,
    make_row,
)
from msn.progress import Progress
from msn.schema import Range, check_ranges, make
from msn.weights import ForeignBackbone
from msn.weights.weights import MAJORITY

_Positive = Annotated[float, Range(0, above_low=True)]
_Fraction = Annotated[float, Range(0, 1)]
_BelowOne = Annotated[float, Range(0, 1, below_high=True)]
_NotNegative = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyper-parameters of fine-tuning (paper A.4); the values live in `configs/protocol/`.

    Raises:
        UserError: a number is out of range.
    """

    epochs: Annotated[int, Range(1)]  # over the labelled images
    # Images per step over all processes, even; the number of labelled images, rounded down to
    # even, where that is less.
    batch_size: Annotated[int, Range(2)]
    lr: _Positive  # peak of the last layer's learning rate, for this batch size
    min_lr: _NotNegative  # at the end of the cosine
    warmup_epochs: _NotNegative  # of a linear warm-up from 0, below `epochs`
    # Of AdamW; not on one-dimensional parameters, class token and position embeddings.
    weight_decay: _NotNegative
    # Factor of the learning rate from each layer to the one below.
    layer_decay: Annotated[float, Range(0, 1, above_low=True)]
    drop_path: _BelowOne  # of the last block, growing linearly from 0
    mixup: _NotNegative  # alpha, 0 for none
    cutmix: _NotNegative  # alpha, 0 for none
    label_smoothing: _BelowOne
    # A policy in timm's words: `rand-m9-mstd0.5-inc1` is RandAugment (9, 0.5); None for none.
    auto_augment: str | None
    random_erasing: _Fraction  # probability
    # Least and greatest area of random crops relative to the image.
    crop_scale: Annotated[Sequence[float], Range(0, 1, above_low=True)]
    flip: _Fraction  # probability of a horizontal flip
    # What the head reads: the class token after the final norm, or, as MAE's, the mean of patches
    # after a new LayerNorm (`fc_norm`), without the final norm.
    pool: str = "token"
    # Train the head and factors of this rank beside each linear layer of the blocks; None trains
    # all weights.
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        check_ranges("protocol.recipe", self)
        if self.batch_size % 2:
            raise UserError(f"protocol.recipe.batch_size={self.batch_size}: must be even")
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"protocol.recipe.warmup_epochs={self.warmup_epochs}: must be below the "
                f"{self.epochs} epochs"
            )
        if self.pool not in ("token", "mean"):
            raise UserError(f"protocol.recipe.pool must be token or mean, got {self.pool}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise UserError(
                f"protocol.recipe.lora_rank={self.lora_rank}: must be >= 1, or null for all weights"
            )
        if self.auto_augment is not None:
            check_policy(self.auto_augment)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Warm-up, then cosine, at the middle of a step (from 0)."""
        at, warmup = step + 0.5, self.warmup_epochs * steps_per_epoch
        if at < warmup:
            return self.lr * at / warmup
        progress = (at - warmup) / (self.epochs * steps_per_epoch - warmup)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def transform(self, subject: FrozenBackbone) -> Callable[[Image.Image], Tensor]:
        """timm's training transform."""
        return timm_views(
            subject.image_size,
            scale=self.crop_scale,
            hflip=self.flip,
            auto_augment=self.auto_augment,
            re_prob=self.random_erasing,
            mean=subject.mean,
            std=subject.std,
        )

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


_TRAINING = 8  # keeps draws of dropped paths and mixtures apart from others of the same seed


class FineTune(Protocol):
    """Train every weight of a backbone and a new linear head on the labelled images.

    Args:
        recipe: see `Recipe`.
        shots: labelled images per class; None takes `fraction`.
        fraction: share of every class in (0, 1]; 1 labels all.
        splits: seeded label sets, each fine-tuned by itself; 1 where all are labelled.
        seed: of the first set, and of the training.
        features: `image_size`, `batch_size` (images per forward pass; larger batches are
            accumulated, which is exact without BatchNorm) and `precision`.
    """

    baselines: ClassVar[tuple[str, ...]] = (MAJORITY,)  # a whole training each
    is_the_papers = True

    def __init__(
        self,
        *,
        recipe: dict[str, Any],
        shots: int | None,
        fraction: float,
        splits: int,
        seed: int,
        features: dict[str, Any],
    ) -> None:
        super().__init__(features)
        self.recipe = make("protocol.recipe", recipe, Recipe, complete=True)
        if not 0 < fraction <= 1:
            raise UserError(f"protocol.fraction must be in (0, 1], got {fraction}")
        check_draws(splits, seed)
        if shots is not None and shots < 1:
            raise UserError(f"protocol.shots must be >= 1, got {shots}")
        self.methods = ("msn",) if self.recipe.pool == "token" else ("mae",)
        self.is_the_papers = self.recipe.lora_rank is None
        self.shots, self.fraction, self.splits, self.seed = shots, fraction, splits, seed

    def label_sets(self, train: LabelledSet) -> list[LabelSet]:
        """Seeded sets of k images per class or a share of each, or all images."""
        seeds = range(self.seed, self.seed + self.splits)
        if self.shots is not None:
            return drawn_shots(train, [self.shots], seeds)
        if self.fraction < 1:
            return drawn_shares(train, self.fraction, seeds)
        return [all_labels(train)]

    def check_backbone(self, backbone: FrozenBackbone) -> None:
        """Refuse a backbone that is not our trunk."""
        if isinstance(backbone.trunk, ForeignBackbone):
            raise UserError(
                f"{backbone.name}: fine-tuning is for plain vision transformers; frozen protocols "
                "(kshot, fraction, knn, linear) measure any backbone"
            )

    def run(
        self, subject: Subject, plan: LabelPlan, test: LabelledSet, runtime: Runtime
    ) -> list[Result]:
        """Fine-tune once for each label set; raw pixels have nothing to tune."""
        if not isinstance(subject, FrozenBackbone):
            return []
        found: list[tuple[Tensor, Tensor]] = []
        replaced: set[int] = set()
        for number, labelled in enumerate(plan.sets):
            images = ChosenImages(plan.images, labelled.positions)
            training = FineTuning(
                subject,
                images,
                self.recipe,
                features=self.features,
                seed=self.seed + number,
                runtime=runtime,
            )
            training.run()
            found.append(training.predict(test))
            seen = over_processes(training.replaced, runtime)
            replaced |= {int(labelled.positions[i]) for i in seen}
        (scores, missing), predicted = found[0], torch.stack([s.argmax(dim=1) for s, _ in found])
        outcome = outcome_of(
            test.labels, predicted, test.classes, unreadable=missing, scores=scores
        )
        row = make_row(
            backbone=subject.name,
            classifier="finetune",
            labels=plan.sets[0].labels,
            outcome=outcome,
            splits=[labelled.split for labelled in plan.sets],
            labelled_images=len(plan.sets[0].positions),
            epochs=self.recipe.epochs,
            **({} if (rank := self.recipe.lora_rank) is None else {"variant": f"LoRA {rank}"}),
        )
        result = Result(row, None, outcome)
        return with_unreadable([result], labelled=len(replaced), held_out=int(missing.sum()))


class FineTuning:
    """One backbone on one label set.

    Args:
        subject: where to start; it is left as it is.
        images: labelled images.
        recipe: hyper-parameters.
        features: images per forward pass and precision.
        seed: of head, order, views, mixtures and dropped paths.
        runtime: the first device trains; `shared` splits each batch over the processes.

    Attributes:
        model: timm's vision transformer with a head.
        replaced: images of this process's share that cannot be read, by number.

    Raises:
        UserError: there are not two images for every process.
    """

    def __init__(
        self,
        subject: FrozenBackbone,
        images: LabelledSet,
        recipe: Recipe,
        *,
        features: FeatureSettings,
        seed: int,
        runtime: Runtime,
    ) -> None:
        self.subject, self.images, self.recipe, self.seed = subject, images, recipe, seed
        self.runtime, self.device = runtime, runtime.devices[0]
        warn_of_idle(runtime, "fine-tuning")
        self.rank, self.world = runtime.rank, runtime.world
        # Mixup pairs the images of a piece, so each piece has an even number.
        even = 2 * self.world
        self.batch_size = min(recipe.batch_size, len(images)) // even * even
        if self.batch_size == 0:
            raise UserError(
                f"fine-tuning needs at least {even} labelled images, there are {len(images)}"
            )
        self.piece_size = max(2, features.batch_size // 2 * 2)
        self.precision = features.precision
        self.half, self.crop = self.precision == "bf16", features.crop
        classes = len(images.classes)
        self.model = classifier_of(subject, classes, drop_path=recipe.drop_path, seed=seed)
        if recipe.pool == "mean":
            average_patches(self.model, subject)
        if recipe.lora_rank is not None:
            add_low_rank(self.model, recipe.lora_rank, seed=seed)
        self.model.to(self.device)
        self.mixture = recipe.mixture(classes)
        self.steps_per_epoch = len(images) // self.batch_size
        self.replaced: set[int] = set()

    def run(self) -> None:
        """Train; every process ends with the same weights.

        Raises:
            UserError: the loss is no longer finite.
        """
        model: nn.Module = self.model
        if self.world > 1:
            own = [self.device] if self.device.type == "cuda" else None
            model = DistributedDataParallel(self.model, device_ids=own)
        optimiser = torch.optim.AdamW(self._groups(), lr=self.recipe.lr)
        total = self.recipe.epochs * self.steps_per_epoch * self.batch_size
        title = f"{self.subject.name}: fine-tuning"
        step = 0
        draws = seeded(self.seed, _TRAINING, self.rank, device=self.device)
        products = float32_products(self.precision, self.device)
        with draws, products, Progress(title, total, self.rank == 0) as bar:
            model.train()
            for epoch in range(self.recipe.epochs):
                for pieces in training_pieces(
                    self.images,
                    self.recipe.transform(self.subject),
                    batch_size=self.batch_size,
                    piece_size=self.piece_size,
                    seed=self.seed,
                    epoch=epoch,
                    runtime=self.runtime,
                    replaced=self.replaced,
                ):
                    rate = self.recipe.learning_rate(step, self.steps_per_epoch)
                    for group in optimiser.param_groups:
                        group["lr"] = rate * group["lr_scale"]
                    optimiser.zero_grad()
                    if not math.isfinite(self._accumulate(model, pieces)):
                        raise UserError(
                            f"{title} diverged in epoch {epoch + 1}; lower protocol.recipe.lr"
                        )
                    optimiser.step()
                    step += 1
                    bar.advance(self.batch_size)
        self.model.eval()

    @torch.no_grad()
    def predict(self, test: LabelledSet) -> tuple[Tensor, Tensor]:
        """Probabilities of the centre crops of some images, [m, C], and which are unreadable."""
        views = TransformedImages(test, self.subject.transform_of(self.crop))
        mine = range(self.rank, len(test), self.world)  # each process its share
        loader = make_loader(
            views,
            batch_sampler=in_pieces(mine, self.piece_size),
            num_workers=self.runtime.num_workers,
        )
        found = torch.zeros(len(test), len(test.classes) + 1)
        for piece, (images, replaced) in zip(in_pieces(mine, self.piece_size), loader, strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                scores = self.model(images.to(self.device)).float().softmax(dim=1)
            found[piece, :-1], found[piece, -1] = scores.cpu(), replaced.float()
        if self.world > 1:
            found = found.to(self.device)  # where every kind of process group can sum
            dist.all_reduce(found)
        return found[:, :-1].cpu(), found[:, -1].bool().cpu()

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by layer, each group with its `lr_scale`."""
        return param_groups_layer_decay(
            self.model,
            self.recipe.weight_decay,
            no_weight_decay_list=self.model.no_weight_decay(),
            layer_decay=self.recipe.layer_decay,
        )

    def _accumulate(self, model: nn.Module, pieces: Iterator[tuple[Tensor, Tensor]]) -> float:
        """Gradients of this process's mean loss; without BatchNorm pieces are exact."""
        count = self.batch_size // self.world
        total = torch.zeros((), device=self.device)
        for images, labels in pieces:
            images, targets = (x.to(self.device, non_blocking=True) for x in (images, labels))
            smoothing = self.recipe.label_smoothing
            if self.mixture is not None:
                images, targets = self.mixture(images, targets)
                smoothing = 0.0  # the mixture has smoothed already
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                scores = model(images)
            loss = F.cross_entropy(scores.float(), targets, label_smoothing=smoothing)
            loss = loss * (len(labels) / count)
            loss.backward()
            total += loss.detach()
        return total.item()
