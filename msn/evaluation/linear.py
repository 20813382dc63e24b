"""Linear evaluation with all labels: the paper's SGD probe (A.3) and logistic regression."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from msn.data.workers import make_loader
from msn.errors import UserError
from msn.evaluation.augment import AugmentedImages, epoch_batches, in_pieces, over_processes
from msn.evaluation.backbones import FrozenBackbone, Subject
from msn.evaluation.features import (
    FeatureSettings,
    LabelledSet,
    Runtime,
    forward_feature,
    warn_of_idle,
)
from msn.evaluation.frozen import check_lambda_choice, logistic_results
from msn.evaluation.logistic import centre_and_normalise
from msn.evaluation.protocol import Plan, Protocol, all_labels, build_logistic, with_unreadable
from msn.evaluation.sets import (
    FeatureSet,
    Head,
    LabelSet,
    Result,
    held_out_features,
    labelled_features,
    make_row,
)
from msn.progress import Progress
from msn.schema import refuse_unknown, take

log = logging.getLogger(__name__)

Batches = Iterator[tuple[Tensor, Tensor, int]]


class Probe:
    """Settings of the SGD probe.

    Args:
        epochs: over the labelled images, >= 1.
        batch_size: images a step over all processes, >= 1; no larger than the labelled set is used.
        lr: peak, for this batch size, > 0; cosine to 0, no warm-up.
        momentum: of Nesterov, in [0, 1).
        weight_decay: >= 0.
        augment: random resized crops and flips, seen by the backbone anew in every epoch; False
            takes the features of centre crops, which costs one pass.
        seed: of order and crops.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        augment: bool,
        seed: int,
    ) -> None:
        if epochs < 1 or batch_size < 1:
            raise UserError(
                f"protocol.sgd: epochs and batch_size must be >= 1, got {epochs}, {batch_size}"
            )
        if not lr > 0 or not 0 <= momentum < 1 or not weight_decay >= 0:
            raise UserError(
                "protocol.sgd: lr must be > 0, momentum in [0, 1), weight_decay >= 0, "
                f"got {lr}, {momentum}, {weight_decay}"
            )
        self.epochs, self.batch_size, self.lr = epochs, batch_size, lr
        self.momentum, self.weight_decay = momentum, weight_decay
        self.augment, self.seed = augment, seed


class Linear(Protocol):
    """Linear classifiers with all labels.

    Args:
        logistic: settings of the full-batch logistic regression (a row `logistic`), see
            `frozen.Logistic`; None leaves it out.
        sgd: settings of the SGD probe (a row `linear`), see `Probe`; None leaves it out.
        features: settings, see `FeatureSettings`.
    """

    baselines: ClassVar[tuple[str, ...]] = ()  # a hundred passes over all images each
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
        self.logistic = None if logistic is None else build_logistic(logistic)
        if sgd is not None:
            refuse_unknown("protocol.sgd", sgd, Probe)
        self.probe = None if sgd is None else Probe(**take("protocol.sgd", sgd, Probe))

    def label_sets(self, train: LabelledSet) -> list[LabelSet]:
        """All images."""
        sets = [all_labels(train)]
        if self.logistic is not None:
            check_lambda_choice(self.logistic, sets, train.labels)
        return sets

    def run(
        self, subject: Subject, plan: Plan, test: LabelledSet, runtime: Runtime
    ) -> list[Result]:
        """Fit both classifiers and test them on centre crops."""
        device = runtime.devices[0]
        found = subject.features(test, self.features, runtime, "held-out images")
        test_set = held_out_features(test, found)
        results = []
        replaced: set[int] = set()
        augment = self.probe is not None and self.probe.augment
        train_set: FeatureSet | None = None
        if self.logistic is not None or not augment or not isinstance(subject, FrozenBackbone):
            found = subject.features(plan.images, self.features, runtime, "labelled images")
            train_set = labelled_features(plan.images, found)
        if self.logistic is not None and train_set is not None:
            results += logistic_results(
                subject.name,
                plan.sets,
                train_set,
                test_set,
                settings=self.logistic,
                feature=subject.kind(self.features),
                device=device,
            )
        if self.probe is not None:
            if augment and isinstance(subject, FrozenBackbone):
                batches = augmented_batches(
                    subject, plan, self.probe, self.features, runtime, replaced=replaced
                )
            else:
                assert train_set is not None
                batches = frozen_batches(train_set, self.probe, runtime)
            weight, bias = train_probe(
                batches,
                self.probe,
                count=len(plan.images),
                classes=len(test.classes),
                runtime=runtime,
            )
            results.append(self._probe_result(subject, weight, bias, plan, test_set))
        seen = len(over_processes(replaced, runtime)) if train_set is None else train_set.replaced
        return with_unreadable(results, labelled=seen, held_out=test_set.replaced)

    def _probe_result(
        self, subject: Subject, weight: Tensor, bias: Tensor, plan: Plan, test: FeatureSet
    ) -> Result:
        assert self.probe is not None
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
            augmented=self.probe.augment and isinstance(subject, FrozenBackbone),
        )
        return Result(row, Head(weight, bias, test.classes, feature, True, True, labelled.split))


def train_probe(
    batches: Batches, probe: Probe, *, count: int, classes: int, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Train a linear layer on centred, normalised rows by SGD with Nesterov momentum.

    Args:
        batches: rows [b, D] of this process, their labels [b], and the size of the whole batch;
            lasts for all epochs.
        probe: settings.
        count: labelled images.
        classes: C.
        runtime: `shared` averages gradients over the processes.

    Returns:
        Weight [C, D] and bias [C], on the CPU.
    """
    head: nn.Linear | None = None
    optimiser: torch.optim.SGD | None = None
    steps = probe.epochs * max(1, count // min(probe.batch_size, count))
    for step, (rows, labels, whole) in enumerate(batches):
        if head is None or optimiser is None:
            head = nn.Linear(rows.shape[1], classes, device=rows.device)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            optimiser = torch.optim.SGD(
                head.parameters(),
                lr=probe.lr,
                momentum=probe.momentum,
                weight_decay=probe.weight_decay,
                nesterov=probe.momentum > 0,
            )
        for group in optimiser.param_groups:
            group["lr"] = probe.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
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


def frozen_batches(train: FeatureSet, probe: Probe, runtime: Runtime) -> Batches:
    """Rows of centre crops, shuffled anew in every epoch; all processes see the whole batch."""
    device = runtime.devices[0]
    rows, labels = centre_and_normalise(train.features).to(device), train.labels.to(device)
    size = min(probe.batch_size, len(rows))
    parts = dist.get_world_size() if runtime.shared else 1
    for epoch in range(probe.epochs):
        for batch in epoch_batches(len(rows), size, seed=probe.seed, epoch=epoch):
            # Gradients are summed over processes that all hold the same rows.
            yield rows[batch], labels[batch], size * parts


def augmented_batches(
    subject: FrozenBackbone,
    plan: Plan,
    probe: Probe,
    features: FeatureSettings,
    runtime: Runtime,
    *,
    replaced: set[int],
) -> Batches:
    """Rows of random crops; each process and worker makes its share of every batch.

    Images of its share that cannot be read are added to `replaced`.
    """
    device, count = runtime.devices[0], len(plan.images)
    rank, world = (dist.get_rank(), dist.get_world_size()) if runtime.shared else (0, 1)
    size = min(probe.batch_size, count)
    warn_of_idle(runtime, "the linear probe")
    trunk = subject.trunk.to(device).eval()
    transform = random_crops(subject.image_size, subject.mean, subject.std)
    positions = torch.arange(count)
    total = probe.epochs * (count // size) * size
    with Progress(f"{subject.name}: linear probe", total, rank == 0) as progress:
        for epoch in range(probe.epochs):
            views = AugmentedImages(plan.images, positions, transform, seed=probe.seed, epoch=epoch)
            batches = epoch_batches(count, size, seed=probe.seed, epoch=epoch)
            pieces = [in_pieces(batch[rank::world], features.batch_size) for batch in batches]
            loader = iter(
                make_loader(
                    views,
                    batch_sampler=[piece for batch in pieces for piece in batch],
                    num_workers=runtime.num_workers,
                    pin_memory=device.type == "cuda",
                )
            )
            for batch in pieces:
                rows, labels = [], []
                for piece in batch:
                    images, wanted, others = next(loader)
                    replaced.update(
                        i for i, other in zip(piece, others.tolist(), strict=True) if other
                    )
                    with torch.autocast(
                        device.type, torch.bfloat16, enabled=features.precision == "bf16"
                    ):
                        found = forward_feature(trunk, images.to(device), features.feature)
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
