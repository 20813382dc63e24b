"""Linear evaluation with all labels: the paper's SGD probe (A.3) and logistic regression."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from msn.errors import UserError
from msn.evaluation.augment import epoch_batches, over_processes, training_pieces, warn_of_idle
from msn.evaluation.backbones import FrozenBackbone, Subject
from msn.evaluation.features import (
    FeatureSettings,
    LabelledSet,
    Runtime,
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

log = logging.getLogger(__name__)

Batches = Iterator[tuple[Tensor, Tensor, int]]


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Settings of the linear probe; the values live in `configs/protocol/linear.yaml`.

    Raises:
        UserError: a number is out of range.
    """

    epochs: Annotated[int, Range(1)]  # over the labelled images
    # Images per step over all processes; a smaller labelled set is one batch.
    batch_size: Annotated[int, Range(1)]
    lr: Annotated[float, Range(0, above_low=True)]  # peak, for this batch size; cosine to 0
    momentum: Annotated[float, Range(0, 1, below_high=True)]  # of Nesterov
    weight_decay: Annotated[float, Range(0)]
    # Random resized crops and flips, seen by the backbone anew in every epoch; False takes the
    # features of centre crops, which costs one pass.
    augment: bool
    seed: int  # of order and crops

    def __post_init__(self) -> None:
        check_ranges("protocol.sgd", self)


class Linear(Protocol):
    """Linear classifiers with all labels.

    Args:
        logistic: settings of the full-batch logistic regression (a row `logistic`), see
            `frozen.Logistic`; None leaves it out.
        sgd: settings of the SGD probe (a row `linear`), see `SGD`; None leaves it out.
        features: settings, see `FeatureSettings`.
    """

    baselines: ClassVar[tuple[str, ...]] = ()  # a hundred passes over all images each
    is_the_papers = True
    methods = ("msn",)  # MAE's probe has a BatchNorm and another optimiser

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
            if augment and isinstance(subject, FrozenBackbone):
                batches = augmented_batches(
                    subject, plan, self.sgd, self.features, runtime, replaced=replaced
                )
            else:
                assert train_set is not None
                batches = frozen_batches(train_set, self.sgd, runtime)
            weight, bias = train_probe(
                batches,
                self.sgd,
                count=len(plan.images),
                classes=len(test.classes),
                runtime=runtime,
            )
            results.append(self._probe_result(subject, weight, bias, plan, test_set))
        seen = len(over_processes(replaced, runtime)) if train_set is None else train_set.replaced
        return with_unreadable(results, labelled=seen, held_out=test_set.replaced)

    def _probe_result(
        self, subject: Subject, weight: Tensor, bias: Tensor, plan: LabelPlan, test: FeatureSet
    ) -> Result:
        assert self.sgd is not None
        predicted = F.linear(centre_and_normalise(test.features), weight, bias).argmax(dim=1)
        labelled, feature = plan.sets[0], subject.kind(self.features)
        row = make_row(
            backbone=subject.name,
            classifier="linear",
            labels=labelled.labels,
            correct=(predicted == test.labels).unsqueeze(0),
            splits=[labelled.split],
            labelled_images=len(plan.images),
            feature=feature,
            augmented=self.sgd.augment and isinstance(subject, FrozenBackbone),
        )
        return Result(row, Head(weight, bias, test.classes, feature, True, True, labelled.split))


def train_probe(
    batches: Batches, sgd: SGD, *, count: int, classes: int, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Train a linear layer on centred, normalised rows by SGD with Nesterov momentum.

    Args:
        batches: rows [b, D] of this process, their labels [b], and the size of the whole batch;
            lasts for all epochs.
        sgd: settings.
        count: labelled images.
        classes: C.
        runtime: `shared` averages gradients over the processes.

    Returns:
        Weight [C, D] and bias [C], on the CPU.
    """
    head: nn.Linear | None = None
    optimiser: torch.optim.SGD | None = None
    steps = sgd.epochs * max(1, count // min(sgd.batch_size, count))
    for step, (rows, labels, whole) in enumerate(batches):
        if head is None or optimiser is None:
            head = nn.Linear(rows.shape[1], classes, device=rows.device)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            optimiser = torch.optim.SGD(
                head.parameters(),
                lr=sgd.lr,
                momentum=sgd.momentum,
                weight_decay=sgd.weight_decay,
                nesterov=sgd.momentum > 0,
            )
        for group in optimiser.param_groups:
            group["lr"] = sgd.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = F.cross_entropy(head(rows), labels, reduction="sum") / whole
        optimiser.zero_grad()
        loss.backward()
        if runtime.shared:
            for parameter in head.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
        optimiser.step()
    assert head is not None
    return head.weight.detach().cpu(), head.bias.detach().cpu()


def frozen_batches(train: FeatureSet, sgd: SGD, runtime: Runtime) -> Batches:
    """Rows of centre crops, shuffled anew in every epoch; all processes see the whole batch."""
    device = runtime.devices[0]
    rows, labels = centre_and_normalise(train.features).to(device), train.labels.to(device)
    size = min(sgd.batch_size, len(rows))
    for epoch in range(sgd.epochs):
        for batch in epoch_batches(len(rows), size, seed=sgd.seed, epoch=epoch):
            # Gradients are summed over processes that all hold the same rows.
            yield rows[batch], labels[batch], size * runtime.world


def augmented_batches(
    subject: FrozenBackbone,
    plan: LabelPlan,
    sgd: SGD,
    features: FeatureSettings,
    runtime: Runtime,
    *,
    replaced: set[int],
) -> Batches:
    """Rows of random crops; each process and worker makes its share of every batch.

    Images of its share that cannot be read are added to `replaced`.
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
                random_crops(subject.image_size, subject.mean, subject.std),
                batch_size=size,
                piece_size=features.batch_size,
                seed=sgd.seed,
                epoch=epoch,
                runtime=runtime,
                replaced=replaced,
            ):
                rows, labels = [], []
                for images, wanted in pieces:
                    with torch.autocast(device.type, torch.bfloat16, enabled=half):
                        found = forward_feature(trunk, images.to(device), feature)
                    rows.append(centre_and_normalise(found.float()))
                    labels.append(wanted.to(device))
                yield torch.cat(rows), torch.cat(labels), size
                progress.advance(size)


def random_crops(
    image_size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Image.Image], Tensor]:
    """Random resized crop and flip, normalised (paper A.3)."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=list(mean), std=list(std)),
        ]
    )
