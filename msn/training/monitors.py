"""What a run tells while it trains: loss terms, use of prototypes, features, schedules, speed."""

import math
import time
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from msn.data.views import Views
from msn.method.distributed import all_reduce_sum, num_processes, whole
from msn.method.loss import LossTerms
from msn.training.cost import flops_per_image, measure_matrix_rate
from msn.training.module import MSNModule

# What a precision multiplies matrices in.
_DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.bfloat16,
}


class Monitors(Callback):
    """Log every `log_every_n_steps` steps and at the end of an epoch, over all processes.

    In between figures are added up on the device; nothing is reduced or brought to the host. Names:
    `train/*`, `collapse/*` (use of prototypes), `features/*`, `schedule/*`, `speed/*`; the table in
    docs/monitoring.md says what each is.

    Attributes:
        latest: what was logged last.
        rows: what was logged in this epoch, oldest first.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self._means = StepMeans()
        self._window: Window | None = None
        self._features: Tensor | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._images = 0
        self._seconds = self._matrix_rate = self._flops = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        assert isinstance(pl_module, MSNModule)
        # The target trunk's class tokens pass here anyway: features without a further pass.
        self._hook = pl_module.network.target.head.register_forward_pre_hook(self._keep_features)
        self._matrix_rate = matrix_rate(pl_module.device, _DTYPES[trainer.precision])
        self._clock = StepClock(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._hook is not None:
            self._hook.remove()

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.rows = []
        self._images = 0
        self._clock.restart()

    def on_train_batch_start(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.step_begins()

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MSNModule)
        self._clock.step_ends()
        self._add(pl_module, outputs, batch)
        self._images += batch.target.shape[0] * num_processes()
        interval = vars(trainer)["log_every_n_steps"]
        if trainer.global_step % interval and not trainer.is_last_batch:
            return
        assert self._window is not None
        self.latest = {
            "epoch": trainer.current_epoch,
            **_to_host(self._means.take() | self._window.figures()),
            **_scheduled(pl_module, trainer.global_step - 1),
            **self._speed(),  # after values have reached the host, so that the work is timed
        }
        self.rows.append(self.latest)
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=trainer.global_step)

    @torch.no_grad()
    def _add(self, module: MSNModule, outputs: Any, batch: Views) -> None:
        terms, features = outputs["terms"], self._features
        assert features is not None
        prototypes = whole(module.network.prototypes)
        if not self._flops:
            self._flops = _flops_per_image(module, batch)
        if self._window is None:
            self._window = Window(prototypes.shape[0], features.shape[1])
        strongest = terms.targets.argmax(dim=-1)
        nearest = strongest_prototypes(outputs["projections"].anchor, prototypes)
        scalars = step_scalars(terms, nearest, strongest, batch.rand.shape[0])
        self._means.add({**scalars, "train/grad_norm": module.grad_norm})
        self._window.add(terms, strongest, features, processes=num_processes())
        self._features = None

    def _speed(self) -> dict[str, float]:
        seconds, waiting = self._clock.read()
        self._seconds += seconds
        rate = self._images / seconds
        speed = {
            "speed/hours": self._seconds / 3600,
            "speed/images_per_s": rate,
            "speed/data_wait": waiting,
            "speed/mfu": rate / num_processes() * self._flops / self._matrix_rate,
        }
        self._images = 0
        self._clock.restart()
        return speed

    def _keep_features(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0].detach().flatten(0, -2)

    def state_dict(self) -> dict[str, Any]:
        """Sums and window, plain: a run resumed within an interval logs what it would have."""
        window = self._window
        state: dict[str, Any] = {
            "seconds": self._seconds,
            "means": (self._means.names, self._means.sums, self._means.steps),
            "window": None,
        }
        if window is not None:
            buckets = (window.older, window.newer)
            plain = (None if bucket is None else tuple(bucket) for bucket in buckets)
            state["window"] = (window.num_prototypes, window.width, *plain)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was added up before the checkpoint."""
        self._seconds = state_dict["seconds"]
        means = self._means
        means.names, means.sums, means.steps = state_dict["means"]
        if state_dict["window"] is not None:
            num_prototypes, width, older, newer = state_dict["window"]
            self._window = Window(num_prototypes, width)
            self._window.older = None if older is None else Bucket(*older)
            self._window.newer = None if newer is None else Bucket(*newer)


def _to_host(figures: dict[str, Tensor]) -> dict[str, float]:
    """All figures in one copy."""
    values = torch.stack([value.float() for value in figures.values()])
    return dict(zip(figures, values.tolist(), strict=True))


matrix_rate = cache(measure_matrix_rate)


def _flops_per_image(module: MSNModule, batch: Views) -> float:
    method = module.settings["method"]
    return flops_per_image(
        model=module.settings["model"],
        head=method["head"],
        num_prototypes=method["num_prototypes"],
        patch_drop=method["patch_drop"],
        rand_views=batch.rand.shape[0],
        focal_views=batch.focal.shape[0],
        rand_size=batch.target.shape[-1],
        focal_size=batch.focal.shape[-1],
    ).total


def _scheduled(module: MSNModule, step: int) -> dict[str, float]:
    assert module.schedule is not None
    return {f"schedule/{name}": value for name, value in module.schedule.at(step)._asdict().items()}


# A window holds at least so many images per prototype and per feature, at most twice that.
IMAGES_PER_PROTOTYPE, IMAGES_PER_DIMENSION = 8, 4


class StepMeans:
    """Means of scalars over the steps since the last row, over all processes.

    A step's value that is not finite is left out: the guard has skipped that step. A mean is NaN
    where no step had a finite value.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        """Sums of finite values and their numbers, [2, names]."""
        self.steps = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the scalars of a step; every step brings the same names."""
        row = torch.stack([value.detach().float() for value in values.values()])
        both = torch.stack([row.nan_to_num(0, 0, 0), row.isfinite().float()])
        self.names = list(values)
        self.sums = both if self.sums is None else self.sums.to(row.device) + both
        self.steps += 1

    def take(self) -> dict[str, Tensor]:
        """The means, still on the device; starts anew."""
        assert self.sums is not None
        total, count = all_reduce_sum(self.sums).unbind()
        self.sums, self.steps = None, 0
        return dict(zip(self.names, (total / count).unbind(), strict=True))


class Window:
    """Use of prototypes and geometry of features over the last images of all processes.

    Two buckets: when the newer one holds enough images the older one is dropped, so that a window
    never is a handful of images, whatever the interval of rows, and memory stays constant.

    Args:
        num_prototypes: K.
        width: D.
    """

    def __init__(self, num_prototypes: int, width: int) -> None:
        self.num_prototypes, self.width = num_prototypes, width
        self.enough = max(IMAGES_PER_PROTOTYPE * num_prototypes, IMAGES_PER_DIMENSION * width)
        self.older: Bucket | None = None
        self.newer: Bucket | None = None

    def add(self, terms: LossTerms, strongest: Tensor, features: Tensor, *, processes: int) -> None:
        """Add the images of a step.

        Args:
            terms: of the loss.
            strongest: prototype of the largest target probability of each image, [B].
            features: of the target's unmasked view, any scale, [B, D].
            processes: number of them, each with as many images.
        """
        if self.newer is not None and self.newer.images * processes >= self.enough:
            self.older, self.newer = self.newer, None
        if self.newer is None:
            self.newer = _empty_bucket(self.num_prototypes, self.width, features.device)
        self.newer = self.newer.add(terms, strongest, features)

    def figures(self) -> dict[str, Tensor]:
        """Use of prototypes and geometry of features, on the device; see docs/monitoring.md."""
        assert self.newer is not None
        total = self.newer if self.older is None else self.newer.plus(self.older)
        used, targets, predictions = all_reduce_sum(total.use).unbind()
        target_entropy, prediction_entropy = (_entropy(x / x.sum()) for x in (targets, predictions))
        moments = all_reduce_sum(total.moments)
        gram = moments[1:]
        images = gram.diagonal().sum().clamp_min(1e-12)  # rows have length 1
        means = moments[0] / images
        variances = (gram.diagonal() / images - means.square()).clamp_min(0)
        return {
            "collapse/prototypes_used": (used > 0).sum(),
            "collapse/prototype_perplexity": target_entropy.exp(),
            "collapse/mean_prediction_entropy": prediction_entropy / math.log(self.num_prototypes),
            "features/rankme": _effective_rank(gram),
            "features/std": variances.sqrt().mean() * math.sqrt(self.width),
        }


class Bucket(NamedTuple):
    """Sums over images."""

    use: Tensor
    """Images whose strongest prototype it is, targets, mean predictions: [3, K]."""
    moments: Tensor
    """Sum and second moments of unit-length features, [1 + D, D]."""
    images: int

    def add(self, terms: LossTerms, strongest: Tensor, features: Tensor) -> "Bucket":
        """This bucket and the images of a step."""
        images = features.shape[0]
        ones = torch.ones(images, device=features.device)
        use = torch.stack(
            [
                torch.zeros_like(self.use[0]).index_add_(0, strongest, ones),
                terms.targets.sum(dim=0).float(),
                terms.mean_prediction.float() * images,
            ]
        )
        unit = F.normalize(features.detach().to(self.moments.dtype), dim=1)
        moments = torch.cat([unit.sum(dim=0, keepdim=True), unit.T @ unit])
        # A step that is not finite is skipped (msn.training.guard) and must not spoil the window.
        return self.plus(Bucket(use.nan_to_num(0, 0, 0), moments.nan_to_num(0, 0, 0), images))

    def plus(self, other: "Bucket") -> "Bucket":
        """Sum of two buckets."""
        device = other.use.device
        return Bucket(
            self.use.to(device) + other.use,
            self.moments.to(device) + other.moments,
            self.images + other.images,
        )


def step_scalars(
    terms: LossTerms, anchor_strongest: Tensor, strongest: Tensor, rand_views: int
) -> dict[str, Tensor]:
    """Scalars of a step on this process.

    Args:
        terms: of the loss.
        anchor_strongest: strongest prototype of each anchor view, [V, B], rand views first.
        strongest: of each image's target, [B].
        rand_views: R.
    """
    agreement = (anchor_strongest == strongest).float().mean(dim=1)  # [V]
    scalars = {
        "train/loss": terms.loss,
        "train/cross_entropy": terms.cross_entropy,
        "train/cross_entropy_floor": _entropy(terms.targets).mean(),
        "train/me_max": terms.me_max,
        "train/entropy": terms.entropy,
        "collapse/target_max_prob": terms.targets.max(dim=-1).values.mean(),
    }
    if rand_views:
        scalars["collapse/agreement_rand"] = agreement[:rand_views].mean()
    if rand_views < len(agreement):
        scalars["collapse/agreement_focal"] = agreement[rand_views:].mean()
    return scalars


def strongest_prototypes(projections: Tensor, prototypes: Tensor) -> Tensor:
    """Number of the prototype of the largest cosine, [..., P] and [K, P] -> [...]."""
    # The scale of a projection does not change which prototype is nearest.
    with torch.autocast(device_type=projections.device.type, enabled=False):
        return (projections.float() @ F.normalize(prototypes.float(), dim=1).T).argmax(dim=-1)


class StepClock:
    """Where the time goes: training steps, or waiting for data and making views.

    On CUDA the device's own time line is read (events), because the host runs ahead of it.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Start a new interval now."""
        self._since = time.perf_counter()
        self._ended: Any = self._now()
        self._waits: list[Any] = []

    def step_begins(self) -> None:
        """The step's views are there."""
        now = self._now()
        self._waits.append((self._ended, now) if self._on_cuda else now - self._ended)

    def step_ends(self) -> None:
        """The step is taken."""
        self._ended = self._now()

    def read(self) -> tuple[float, float]:
        """Seconds of the interval and the share of them between steps; after a synchronisation."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        if self._on_cuda:
            waited = sum(end.elapsed_time(begin) for end, begin in self._waits) / 1000
        else:
            waited = sum(self._waits)
        return seconds, min(1.0, waited / seconds)

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _empty_bucket(num_prototypes: int, width: int, device: torch.device) -> Bucket:
    # Second moments of collapsed features need the digits; MPS has no float64.
    precise = torch.float32 if device.type == "mps" else torch.float64
    return Bucket(
        torch.zeros(3, num_prototypes, device=device),
        torch.zeros(1 + width, width, dtype=precise, device=device),
        0,
    )


def _entropy(probs: Tensor) -> Tensor:
    """In nats, [..., K] -> [...]."""
    return -torch.special.xlogy(probs, probs).sum(dim=-1)


def _effective_rank(gram: Tensor) -> Tensor:
    """RankMe from second moments X^T X, whose eigenvalues are the squared singular values of X.

    Features that are not finite, of a training that has diverged, have the rank nan.
    """
    host = gram.cpu() if gram.device.type == "mps" else gram  # MPS has no eigenvalues
    values = torch.linalg.eigvalsh(host.nan_to_num(0, 0, 0)).clamp_min(0).sqrt().to(gram.device)
    rank = _entropy(values / values.sum().clamp_min(1e-12)).exp()
    return rank.where(gram.isfinite().all(), math.nan)
