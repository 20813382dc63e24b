"""Heads trained by gradient descent on frozen features, with several settings side by side.

The setting is chosen on a fifth of the labelled images, which the heads have not seen. The chosen
head is then trained on all of them. Test images take no part. At the end of the file: the
classifier that fine-tuning starts from.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from msn.data.sampler import permutation
from msn.errors import UserError
from msn.evaluation.backbones import FrozenBackbone, Subject
from msn.evaluation.features import LabelledSet, Runtime
from msn.evaluation.frozen import folds_of
from msn.evaluation.lowshot import FeatureProtocol, LabelPlan
from msn.evaluation.sets import FeatureSet, LabelSet, Result, Trial, all_labels, make_row
from msn.method.vit import VisionTransformer
from msn.progress import Progress
from msn.schema import Range, check_ranges, make
from msn.weights.timm import TimmModel, timm_twin
from msn.weights.weights import MAJORITY, PIXELS, RANDOM, resized_positions

_FOLDS = 5  # one of them chooses the setting
_ORDER_DRAWS = 10  # keeps these draws apart from others
_HEAD_STD = 2e-5  # of the head before fine-tuning
_MAX_NUMBERS = 2**30  # of all patch tokens together: 4 GiB


@dataclass(frozen=True, kw_only=True)
class Training:
    """How heads are trained; the values are in `configs/protocol/sweep.yaml` and `attentive.yaml`.

    Raises:
        UserError: a value is out of range.
    """

    lrs: Sequence[float]  # peak learning rates for this batch size; cosine to 0
    epochs: Annotated[int, Range(1)]
    batch_size: Annotated[int, Range(1)]
    weight_decay: Annotated[float, Range(0)]
    seed: Annotated[int, Range(0, 2**32 - 1)]  # of order and first weights

    def __post_init__(self) -> None:
        check_ranges("protocol.training", self)
        if not self.lrs or not all(rate > 0 for rate in self.lrs):
            raise UserError(f"protocol.training.lrs must be a list of rates > 0, got {self.lrs}")


class Choice(NamedTuple):
    """Settings of one head."""

    lr: float
    about: dict[str, Any]
    """Further settings, for the row."""
    first: int = 0
    """First column of the features that it reads."""
    last: int | None = None
    """Column before which it stops; None reads to the end."""


class _Heads(FeatureProtocol):
    """All labels; the best of several heads."""

    classifier: ClassVar[str]
    variant: ClassVar[str | None] = None

    def __init__(self, training: dict[str, Any], features: dict[str, Any]) -> None:
        super().__init__(features)
        self.training = make("protocol.training", training, Training, complete=True)

    @abstractmethod
    def choices(self, trial: Trial) -> list[Choice]:
        """The settings to try."""

    @abstractmethod
    def head(self, choice: Choice, width: int, classes: int) -> nn.Module:
        """A new head, from rows [B, width] to scores [B, classes]."""

    @abstractmethod
    def optimiser(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """For the parameters of all heads."""

    def label_sets(self, train: LabelledSet) -> list[LabelSet]:
        """All images."""
        if not folds_of(train.labels, _FOLDS, of=0):
            raise UserError("protocol: no class has two images, one to train on and one to choose")
        return [all_labels(train)]

    def results(self, trial: Trial) -> list[Result]:
        """One row: of the head that classifies most held-back labelled images correctly."""
        train, choices = trial.train, self.choices(trial)
        fold = folds_of(train.labels, _FOLDS, of=0, groups=train.groups)[0]
        tried = self._train(choices, train, fold.train, trial)
        rows, labels = train.features[fold.held_out], train.labels[fold.held_out]
        right = [
            (_scores(head, choice, rows, trial.device).argmax(1) == labels).double().mean()
            for head, choice in zip(tried, choices, strict=True)
        ]
        best = max(range(len(choices)), key=lambda i: float(right[i]))
        chosen = choices[best]
        (head,) = self._train([chosen], train, torch.arange(len(train.labels)), trial)
        scores = _scores(head, chosen, trial.test.features, trial.device)
        outcome = trial.test.outcome(scores.argmax(1).unsqueeze(0), scores.softmax(1))
        more = {} if self.variant is None else {"variant": self.variant}
        row = make_row(
            backbone=trial.backbone,
            classifier=self.classifier,
            labels=trial.sets[0].labels,
            outcome=outcome,
            splits=[trial.sets[0].split],
            labelled_images=len(train.labels),
            feature=trial.feature,
            chosen={"lr": chosen.lr, **chosen.about, "top1_inside": float(right[best])},
            **more,
        )
        return [Result(row, None, outcome)]

    def _train(
        self, choices: Sequence[Choice], train: FeatureSet, positions: Tensor, trial: Trial
    ) -> list[nn.Module]:
        """One head per choice, all in one pass over the rows at `positions`."""
        settings, device = self.training, trial.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            width, classes = train.features.shape[1], len(train.classes)
            heads = [
                self.head(one, (one.last or width) - one.first, classes).to(device)
                for one in choices
            ]
        pairs = list(zip(heads, choices, strict=True))
        groups = [{"params": list(head.parameters()), "lr": one.lr} for head, one in pairs]
        optimiser = self.optimiser(groups)
        size = min(settings.batch_size, len(positions))
        steps = settings.epochs * (len(positions) // size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        with Progress(f"{trial.backbone}: {len(heads)} heads", settings.epochs, True) as progress:
            for epoch in range(settings.epochs):
                order = permutation(len(positions), settings.seed, _ORDER_DRAWS, epoch)
                for some in torch.from_numpy(order).split(size)[: len(positions) // size]:
                    rows = train.features[positions[some]].to(device)
                    labels = train.labels[positions[some]].to(device)
                    losses = [
                        F.cross_entropy(head(rows[:, one.first : one.last]), labels)
                        for head, one in pairs
                    ]
                    optimiser.zero_grad()
                    torch.stack(losses).sum().backward()  # heads share nothing
                    optimiser.step()
                    schedule.step()
                progress.advance(1)
        return [head.eval() for head in heads]


@torch.no_grad()
def _scores(head: nn.Module, choice: Choice, rows: Tensor, device: torch.device) -> Tensor:
    parts = rows[:, choice.first : choice.last].split(1024)
    return torch.cat([head(part.to(device)).cpu() for part in parts])


class Sweep(_Heads):
    """Linear heads as in DINOv2 and DINOv3: every learning rate with every feature.

    The features are the class tokens of the last n blocks, alone or with the mean of the patches
    (arXiv 2304.07193, B.3). All heads are trained side by side.

    Args:
        blocks: numbers n to try, the largest as in `features.feature=last_N_mean`.
        training: settings, see `Training`; SGD with momentum 0.9.
        features: settings, see `FeatureSettings`.
    """

    classifier = "linear"
    variant = "sweep"

    def __init__(
        self, *, blocks: list[int], training: dict[str, Any], features: dict[str, Any]
    ) -> None:
        super().__init__(training, features)
        if not blocks or min(blocks) < 1 or self.features.feature != f"last_{max(blocks)}_mean":
            raise UserError(
                f"protocol.blocks={blocks}: must be numbers >= 1, of which the largest is N in "
                f"protocol.features.feature=last_N_mean, got {self.features.feature}"
            )
        self.blocks = sorted(set(blocks))

    def choices(self, trial: Trial) -> list[Choice]:
        """Every learning rate with every feature."""
        if trial.feature == PIXELS:
            return [Choice(lr, {}) for lr in self.training.lrs]
        width = trial.train.features.shape[1] // (max(self.blocks) + 1)
        tokens = max(self.blocks) * width
        return [
            Choice(
                lr, {"blocks": n, "patch_mean": mean}, tokens - n * width, None if mean else tokens
            )
            for n in self.blocks
            for mean in (False, True)
            for lr in self.training.lrs
        ]

    def head(self, choice: Choice, width: int, classes: int) -> nn.Module:
        """A linear layer that starts at zero."""
        layer = nn.Linear(width, classes)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def optimiser(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """SGD with momentum 0.9."""
        decay = self.training.weight_decay
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=decay)


class Attentive(_Heads):
    """Attentive probe: one learned query attends to the patch tokens, then a linear layer.

    Args:
        num_heads: attention heads of the query; divides the backbone's width.
        training: settings, see `Training`; AdamW.
        features: settings, with `feature=patches`.
    """

    classifier = "attentive"
    baselines: ClassVar[tuple[str, ...]] = (MAJORITY, RANDOM)

    def __init__(
        self, *, num_heads: int, training: dict[str, Any], features: dict[str, Any]
    ) -> None:
        super().__init__(training, features)
        if num_heads < 1 or self.features.feature != "patches":
            raise UserError(
                f"protocol.num_heads must be >= 1, got {num_heads}; protocol.features.feature must "
                f"be patches, got {self.features.feature}"
            )
        self.num_heads, self._width = num_heads, 0

    def check_backbone(self, backbone: FrozenBackbone) -> None:
        """Refuse a backbone without patch tokens, or whose width `num_heads` does not divide."""
        super().check_backbone(backbone)
        assert isinstance(backbone.trunk, VisionTransformer)  # no other gives `patches`
        if backbone.trunk.embed_dim % self.num_heads:
            raise UserError(
                f"protocol.num_heads={self.num_heads}: must divide {backbone.trunk.embed_dim}, "
                f"the width of {backbone.name}"
            )

    def run(
        self, subject: Subject, plan: LabelPlan, test: LabelledSet, runtime: Runtime
    ) -> list[Result]:
        """As `FeatureProtocol`.

        Raises:
            UserError: the tokens do not fit into memory; or the subject is raw pixels.
        """
        trunk = getattr(subject, "trunk", None)
        if not isinstance(trunk, VisionTransformer):
            raise UserError(f"protocol=attentive: {subject.name} has no patch tokens; leave it out")
        assert isinstance(subject, FrozenBackbone)
        self._width = trunk.embed_dim
        tokens = (subject.image_size // trunk.patch_size) ** 2
        if (len(plan.images) + len(test)) * tokens * self._width > _MAX_NUMBERS:
            raise UserError(
                f"protocol=attentive: {tokens} tokens per image, of {len(plan.images) + len(test)} "
                "images, take more than 4 GiB; evaluate on fewer images"
            )
        return super().run(subject, plan, test, runtime)

    def choices(self, trial: Trial) -> list[Choice]:
        """Every learning rate."""
        return [Choice(lr, {}) for lr in self.training.lrs]

    def head(self, choice: Choice, width: int, classes: int) -> nn.Module:
        """Norm, cross-attention of the query, linear layer."""
        return _AttentiveHead(self._width, self.num_heads, classes)

    def optimiser(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(groups, lr=1.0, weight_decay=self.training.weight_decay)


class _AttentiveHead(nn.Module):
    """From patch tokens [B, T * D] to scores [B, C]."""

    def __init__(self, width: int, num_heads: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.linear = nn.Linear(width, classes)

    def forward(self, rows: Tensor) -> Tensor:
        tokens = self.norm(rows.unflatten(1, (-1, self.query.shape[2])))
        query = self.query.expand(len(rows), -1, -1)
        found, _ = self.attention(query, tokens, tokens, need_weights=False)
        scores: Tensor = self.linear(found[:, 0])
        return scores


def classifier_of(
    subject: FrozenBackbone, num_classes: int, *, drop_path: float, seed: int
) -> TimmModel:
    """timm's vision transformer with the weights of a backbone and a new, nearly zero head.

    Position embeddings are resized as in pretraining where the image size is another.
    """
    assert isinstance(subject.trunk, VisionTransformer)  # see `check_backbone`
    trunk = subject.trunk
    model = {**trunk.model_config, "img_size": subject.image_size}
    state = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    if subject.image_size != trunk.img_size:
        state, _ = resized_positions(state, model, subject.image_size)
    twin = timm_twin(state, model, num_classes=num_classes, drop_path_rate=drop_path)
    head = torch.randn(num_classes, trunk.embed_dim, generator=torch.Generator().manual_seed(seed))
    twin.get_submodule("head").load_state_dict(
        {"weight": _HEAD_STD * head, "bias": torch.zeros(num_classes)}
    )
    return twin.train()


def average_patches(model: TimmModel, subject: FrozenBackbone) -> None:
    """Make a classifier read the mean of patches through a new norm, as MAE's fine-tuning does.

    A file that was fine-tuned so already gives that norm (`pool` of what is known about it).
    """
    norm = model.get_submodule("norm")
    assert isinstance(norm, nn.LayerNorm)
    new = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    if subject.about.get("pool") == "mean":
        new.load_state_dict(norm.state_dict())
    model.norm, model.fc_norm, model.global_pool = nn.Identity(), new, "avg"


class _LowRank(nn.Module):
    """A weight plus B A, of which B starts at zero (LoRA, arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, into = weight.shape
        self.a = nn.Parameter(torch.randn(rank, into, generator=generator) / math.sqrt(into))
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def add_low_rank(model: TimmModel, rank: int, *, seed: int) -> None:
    """Freeze a classifier but its head, and give each linear layer of its blocks trained factors.

    What the model computes stays the same until the first step.
    """
    kept = ("head.", "fc_norm.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(kept))
    generator = torch.Generator().manual_seed(seed)
    for layer in model.get_submodule("blocks").modules():
        if isinstance(layer, nn.Linear):
            register_parametrization(layer, "weight", _LowRank(layer.weight, rank, generator))
