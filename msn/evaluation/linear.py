"""Linear evaluation with all labels: logistic regression, SGD probes of MSN (A.3) and MAE."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.optim import Lars
from torch import Tensor, nn
from torchvision.transforms import v2

from msn.errors import UserError
from msn.evaluation.augment import epoch_batches, over_processes, training_pieces, warn_of_idle
from msn.evaluation.backbones import FrozenBackbone, Subject
from msn.evaluation.features import (
    FeatureSettings,
    LabelledSet,
    Runtime,
    float32_products,
    forward_feature,
)
from msn.evaluation.frozen import Logistic, check_lambda_choice, logistic_results
from msn.evaluation.logistic import centre_and_normalise
from msn.evaluation.lowshot import LabelPlan, Protocol, with_unreadable
from msn.evaluation.sets import (
    FeatureSet,
    Head,
    LabelSet,
    Result,
    Trial,
    all_labels,
    held_out_features,
    labelled_features,
    make_row,
)
from msn.progress import Progress
from msn.schema import Range, check_ranges, make
from msn.weights.weights import MAJORITY

log = logging.getLogger(__name__)

Batches = Iterator[tuple[Tensor, Tensor, int]]


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Settings of the linear probe; the values live in `configs/protocol/linear*.yaml`.

    Raises:
        UserError: a value is out of range.
    """

    epochs: Annotated[int, Range(1)]  # over the labelled images
    # Images per step over all processes; a smaller labelled set is one batch.
    batch_size: Annotated[int, Range(1)]
    lr: Annotated[float, Range(0, above_low=True)]  # peak, for this batch size; cosine to 0
    warmup_epochs: Annotated[float, Range(0)]  # of a linear warm-up from 0, below `epochs`
    momentum: Annotated[float, Range(0, 1, below_high=True)]  # Nesterov's, plain with `lars`
    weight_decay: Annotated[float, Range(0)]
    # Steps of the weight matrix are scaled by its norm (LARS, arXiv 1708.03888, trust coefficient
    # 0.001). For that, it starts with a standard deviation of 0.01; else it starts at 0.
    lars: bool
    # BatchNorm without affine before the layer; False centres and normalises each row by itself.
    batch_norm: bool
    # New random resized crops and flips in every epoch, each through the backbone; False takes the
    # features of centre crops, which costs one pass.
    augment: bool
    interpolation: str  # of the crops, bilinear or bicubic
    seed: int  # of order, crops and first weights

    def __post_init__(self) -> None:
        check_ranges("protocol.sgd", self)
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"protocol.sgd.warmup_epochs={self.warmup_epochs}: must be below the "
                f"{self.epochs} epochs"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(
                f"protocol.sgd.interpolation must be bilinear or bicubic, got {self.interpolation}"
            )

    def learning_rate(self, epoch: float) -> float:
        """Warm-up, then cosine to 0."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def prepared(self, features: Tensor) -> Tensor:
        """The probe's input, [n, D]."""
        return features if self.batch_norm else centre_and_normalise(features)

    def optimiser(self, head: nn.Linear) -> torch.optim.Optimizer:
        """Initialise a new layer and make its optimiser."""
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        if not self.lars:
            return torch.optim.SGD(
                head.parameters(),
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                nesterov=self.momentum > 0,
            )
        draws = torch.Generator().manual_seed(self.seed)
        first = torch.empty(head.weight.shape)
        head.weight.data.copy_(nn.init.trunc_normal_(first, std=0.01, generator=draws))
        groups = [
            {"params": [head.weight], "weight_decay": self.weight_decay, "always_adapt": True},
            {"params": [head.bias]},
        ]
        return Lars(groups, lr=self.lr, momentum=self.momentum)


class Linear(Protocol):
    """Linear classifiers with all labels.

    Args:
        logistic: settings of the full-batch logistic regression (a row `logistic`), see
            `frozen.Logistic`; None leaves it out.
        sgd: settings of the SGD probe (a row `linear`), see `SGD`; None leaves it out.
        features: settings, see `FeatureSettings`.
    """

    baselines: ClassVar[tuple[str, ...]] = (MAJORITY,)  # others take a hundred passes each
    is_the_papers = True

    def __init__(
        self,
        *,
        logistic: dict[str, Any] | None,
        sgd: dict[str, Any] | None,
        features: dict[str, Any],
    ) -> None:
        super().__init__(features)
        if logistic is None and sgd is None:
            raise UserError("protocol: logistic=null and sgd=null leave nothing to do")
        self.logistic, self.sgd = None, None
        if logistic is not None:
            self.logistic = make("protocol.logistic", logistic, Logistic, complete=True)
        if sgd is not None:
            self.sgd = make("protocol.sgd", sgd, SGD, complete=True)
        mae = self.sgd is not None and self.sgd.batch_norm
        self.methods = ("mae",) if mae else ("msn",)

    def label_sets(self, train: LabelledSet) -> list[LabelSet]:
        """All images."""
        sets = [all_labels(train)]
        if self.logistic is not None:
            check_lambda_choice(self.logistic, sets, train.labels)
        return sets

    def run(
        self, subject: Subject, plan: LabelPlan, test: LabelledSet, runtime: Runtime
    ) -> list[Result]:
        """Fit both classifiers and test them on centre crops."""
        found = subject.features(test, self.features, runtime, "held-out images")
        test_set = held_out_features(test, found)
        results = []
        replaced: set[int] = set()
        augment = self.sgd is not None and self.sgd.augment
        train_set: FeatureSet | None = None
        if self.logistic is not None or not augment or not isinstance(subject, FrozenBackbone):
            found = subject.features(plan.images, self.features, runtime, "labelled images")
            train_set = labelled_features(plan.images, found)
        if self.logistic is not None and train_set is not None:
            kind = subject.kind(self.features)
            trial = Trial(subject.name, kind, plan.sets, train_set, test_set, runtime.devices[0])
            results += logistic_results(trial, self.logistic)
        if self.sgd is not None:
            if (count := len(plan.images)) < self.sgd.batch_size:
                log.info(
                    "%s: the %d labelled images, fewer than protocol.sgd.batch_size=%d, are one "
                    "batch, so an epoch is one step",
                    subject.name,
                    count,
                    self.sgd.batch_size,
                )
            if augment and isinstance(subject, FrozenBackbone):
                batches = augmented_batches(
                    subject, plan, self.sgd, self.features, runtime, replaced=replaced
                )
            else:
                assert train_set is not None
                batches = frozen_batches(train_set, self.sgd, runtime)
            weight, bias = train_probe(
                batches, self.sgd, count=count, classes=len(test.classes), runtime=runtime
            )
            results.append(self._probe_result(subject, weight, bias, plan, test_set))
        seen = len(over_processes(replaced, runtime)) if train_set is None else train_set.replaced
        return with_unreadable(results, labelled=seen, held_out=test_set.replaced)

    def _probe_result(
        self, subject: Subject, weight: Tensor, bias: Tensor, plan: LabelPlan, test: FeatureSet
    ) -> Result:
        assert self.sgd is not None
        scores = F.linear(self.sgd.prepared(test.features), weight, bias)
        outcome = test.outcome(scores.argmax(dim=1).unsqueeze(0), scores.softmax(dim=1))
        labelled, feature = plan.sets[0], subject.kind(self.features)
        row = make_row(
            backbone=subject.name,
            classifier="linear",
            labels=labelled.labels,
            outcome=outcome,
            splits=[labelled.split],
            labelled_images=len(plan.images),
            feature=feature,
            augmented=self.sgd.augment and isinstance(subject, FrozenBackbone),
        )
        rows = not self.sgd.batch_norm
        head = Head(weight, bias, test.classes, feature, rows, rows, labelled.split)
        return Result(row, head, outcome)


def train_probe(
    batches: Batches, sgd: SGD, *, count: int, classes: int, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Train a linear layer by SGD with momentum.

    Args:
        batches: rows [b, D] of this process, their labels [b], and the size of the whole batch;
            for all epochs.
        sgd: settings.
        count: labelled images.
        classes: C.
        runtime: `shared` sums gradients over the processes.

    Returns:
        Weight [C, D] and bias [C] on the CPU, for rows from `sgd.prepared`; BatchNorm's running
        statistics are folded in.
    """
    head: nn.Linear | None = None
    optimiser: torch.optim.Optimizer | None = None
    norm: _BatchNorm | None = None
    steps_per_epoch = max(1, count // min(sgd.batch_size, count))
    for step, (rows, labels, whole) in enumerate(batches):
        if head is None or optimiser is None:
            head = nn.Linear(rows.shape[1], classes, device=rows.device)
            optimiser = sgd.optimiser(head)
            norm = _BatchNorm(head.weight[0].detach(), runtime.shared) if sgd.batch_norm else None
        for group in optimiser.param_groups:
            group["lr"] = sgd.learning_rate(step / steps_per_epoch)
        seen = rows if norm is None else norm(rows, whole)
        loss = F.cross_entropy(head(seen), labels, reduction="sum") / whole
        optimiser.zero_grad()
        loss.backward()
        if runtime.shared:
            for parameter in head.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
        optimiser.step()
    assert head is not None
    weight, bias = head.weight.detach(), head.bias.detach()
    if norm is not None:
        weight = weight * norm.scale
        bias = bias - weight @ norm.mean
    return weight.cpu(), bias.cpu()


class _BatchNorm:
    """`nn.BatchNorm1d` without affine over all processes, for rows without gradient."""

    def __init__(self, like: Tensor, shared: bool) -> None:
        self.shared = shared
        self.mean, self.variance = torch.zeros_like(like), torch.ones_like(like)  # running, [D]

    def __call__(self, rows: Tensor, whole: int) -> Tensor:
        """Normalise this process's rows [b, D] of a batch of `whole` rows."""
        mean = self._sum(rows) / whole
        variance = self._sum((rows - mean).square()) / whole
        self.mean.lerp_(mean, 0.1)
        self.variance.lerp_(variance * (whole / max(1, whole - 1)), 0.1)
        return (rows - mean) * (variance + _EPS).rsqrt()

    @property
    def scale(self) -> Tensor:
        """Factor of the rows after training, [D]."""
        return (self.variance + _EPS).rsqrt()

    def _sum(self, rows: Tensor) -> Tensor:
        total = rows.sum(dim=0)
        if self.shared:
            dist.all_reduce(total)
        return total


_EPS = 1e-6  # of BatchNorm


def frozen_batches(train: FeatureSet, sgd: SGD, runtime: Runtime) -> Batches:
    """Rows of centre crops, shuffled in every epoch; each process takes its share of a batch."""
    device = runtime.devices[0]
    rows, labels = sgd.prepared(train.features).to(device), train.labels.to(device)
    size = min(sgd.batch_size, len(rows))
    for epoch in range(sgd.epochs):
        for batch in epoch_batches(len(rows), size, seed=sgd.seed, epoch=epoch):
            mine = batch[runtime.rank :: runtime.world]
            yield rows[mine], labels[mine], size


def augmented_batches(
    subject: FrozenBackbone,
    plan: LabelPlan,
    sgd: SGD,
    features: FeatureSettings,
    runtime: Runtime,
    *,
    replaced: set[int],
) -> Batches:
    """Rows of random crops; each process makes its share of every batch.

    `replaced` gets the unreadable images of its share.
    """
    device, count = runtime.devices[0], len(plan.images)
    size = min(sgd.batch_size, count)
    warn_of_idle(runtime, "the linear probe")
    trunk = subject.trunk.to(device).eval()
    half, feature = features.precision == "bf16", subject.kind(features)
    total = sgd.epochs * (count // size) * size
    with Progress(f"{subject.name}: linear probe", total, runtime.rank == 0) as progress:
        for epoch in range(sgd.epochs):
            for pieces in training_pieces(
                plan.images,
                random_crops(subject, sgd.interpolation),
                batch_size=size,
                piece_size=features.batch_size,
                seed=sgd.seed,
                epoch=epoch,
                runtime=runtime,
                replaced=replaced,
            ):
                rows, labels = [], []
                for images, wanted in pieces:
                    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
                    with float32_products(features.precision, device), autocast:
                        moved = images.to(device, non_blocking=True)
                        found = forward_feature(trunk, moved, feature)
                    rows.append(sgd.prepared(found.float()))
                    labels.append(wanted.to(device, non_blocking=True))
                yield torch.cat(rows), torch.cat(labels), size
                progress.advance(size)


def random_crops(subject: FrozenBackbone, interpolation: str) -> Callable[[Image.Image], Tensor]:
    """Random resized crop and flip, normalised (paper A.3)."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                subject.image_size, interpolation=v2.InterpolationMode(interpolation)
            ),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=list(subject.mean), std=list(subject.std)),
        ]
    )
