"""Sums over steps and images, kept on the device until the monitors log a row; and a step clock."""

import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msn.method.distributed import all_reduce_sum

# Images per prototype and per feature that a window holds at least; at most twice as many.
IMAGES_PER_PROTOTYPE, IMAGES_PER_DIMENSION = 8, 4


class StepMeans:
    """Means of scalars over the steps since the last row, over all processes.

    Non-finite values are left out: the guard has skipped these steps. A mean without any finite
    value is NaN.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # sums of finite values and their counts, [2, names]
        self.steps = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the scalars of a step; the names are the same in every step."""
        row = torch.stack([value.detach().float() for value in values.values()])
        both = torch.stack([row.nan_to_num(0, 0, 0), row.isfinite().float()])
        self.names = list(values)
        self.sums = both if self.sums is None else self.sums.to(row.device) + both
        self.steps += 1

    def take(self) -> dict[str, Tensor]:
        """Return the means, still on the device, and reset."""
        assert self.sums is not None
        total, count = all_reduce_sum(self.sums).unbind()
        self.sums, self.steps = None, 0
        return dict(zip(self.names, (total / count).unbind(), strict=True))


class Window:
    """Use of prototypes and geometry of features over the last images of all processes.

    When the newer of two buckets holds enough images, the older one is dropped. So a window is
    never too small, whatever the interval of rows, and memory is constant.

    Args:
        num_prototypes: K, 0 for a method without prototypes.
        width: D.
    """

    def __init__(self, num_prototypes: int, width: int) -> None:
        self.num_prototypes, self.width = num_prototypes, width
        self.enough = max(IMAGES_PER_PROTOTYPE * num_prototypes, IMAGES_PER_DIMENSION * width)
        self.older: Bucket | None = None
        self.newer: Bucket | None = None

    def add(self, use: Tensor, features: Tensor, *, processes: int) -> None:
        """Add the images of a step.

        Args:
            use: of the prototypes, see `Bucket`.
            features: class tokens, any scale, [B, D].
            processes: number of processes, each with B images.
        """
        if self.newer is not None and self.newer.images * processes >= self.enough:
            self.older, self.newer = self.newer, None
        if self.newer is None:
            self.newer = _empty_bucket(self.num_prototypes, self.width, features.device)
        self.newer = self.newer.add(use, features)

    def figures(self, *, rank: bool) -> dict[str, Tensor]:
        """Use of prototypes and geometry of features, on the device; see docs/monitoring.md.

        Args:
            rank: also the effective rank, which takes about as long as a step.
        """
        assert self.newer is not None
        total = self.newer if self.older is None else self.newer.plus(self.older)
        moments = all_reduce_sum(total.moments)
        gram = moments[1:]
        images = gram.diagonal().sum().clamp_min(1e-12)  # rows have length 1
        means = moments[0] / images
        variances = (gram.diagonal() / images - means.square()).clamp_min(0)
        figures = self._use(total.use)
        if rank:
            figures["features/rankme"] = _effective_rank(gram)
        return figures | {"features/std": variances.sqrt().mean() * math.sqrt(self.width)}

    def _use(self, use: Tensor) -> dict[str, Tensor]:
        if not self.num_prototypes:
            return {}
        used, targets, predictions = all_reduce_sum(use).unbind()
        target_entropy, prediction_entropy = (entropy(x / x.sum()) for x in (targets, predictions))
        return {
            "collapse/prototypes_used": (used > 0).sum(),
            "collapse/prototype_perplexity": target_entropy.exp(),
            "collapse/mean_prediction_entropy": prediction_entropy / math.log(self.num_prototypes),
        }


class Bucket(NamedTuple):
    """Sums over images."""

    use: Tensor  # per prototype: images it is strongest in, targets, mean predictions; [3, K]
    moments: Tensor  # sum and second moments of unit-length features, [1 + D, D]
    images: int

    def add(self, use: Tensor, features: Tensor) -> "Bucket":
        """This bucket and the images of a step."""
        unit = F.normalize(features.detach().to(self.moments.dtype), dim=1)
        moments = torch.cat([unit.sum(dim=0, keepdim=True), unit.T @ unit])
        # Steps that are not finite are skipped (msn.training.guard) and must not spoil the window.
        return self.plus(
            Bucket(use.nan_to_num(0, 0, 0), moments.nan_to_num(0, 0, 0), len(features))
        )

    def plus(self, other: "Bucket") -> "Bucket":
        """Sum of two buckets."""
        device = other.use.device
        return Bucket(
            self.use.to(device) + other.use,
            self.moments.to(device) + other.moments,
            self.images + other.images,
        )


class StepClock:
    """Time of an interval, and the share of it between steps: waiting for data, making views.

    On CUDA it reads the device's events, because the host runs ahead.
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
        """Call when the step's views are ready."""
        now = self._now()
        self._waits.append((self._ended, now) if self._on_cuda else now - self._ended)

    def step_ends(self) -> None:
        """Call after the step."""
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
    # Collapsed features need float64, which MPS does not have.
    precise = torch.float32 if device.type == "mps" else torch.float64
    return Bucket(
        torch.zeros(3, num_prototypes, device=device),
        torch.zeros(1 + width, width, dtype=precise, device=device),
        0,
    )


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats, [..., K] -> [...]."""
    return -torch.special.xlogy(probs, probs).sum(dim=-1)


def _effective_rank(gram: Tensor) -> Tensor:
    """RankMe from second moments X^T X, whose eigenvalues are the squared singular values of X.

    It is NaN for features that are not finite.
    """
    host = gram.cpu() if gram.device.type == "mps" else gram  # MPS cannot compute eigenvalues
    values = torch.linalg.eigvalsh(host.nan_to_num(0, 0, 0)).clamp_min(0).sqrt().to(gram.device)
    rank = entropy(values / values.sum().clamp_min(1e-12)).exp()
    return rank.where(gram.isfinite().all(), math.nan)
