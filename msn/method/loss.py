"""The MSN loss as pure functions, in log space (paper section 3, Eq. 1; PMSN, arXiv 2210.07277).

Legend: V anchor views, B images of this process, P projection width, K prototypes.
Everything runs in at least float32: half types are promoted, float64 stays.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msn.errors import UserError
from msn.method.distributed import all_reduce_logmeanexp, all_reduce_logsumexp

_MOST_ITERATIONS = 1000  # of Sinkhorn-Knopp, which has converged long before


class LossTerms(NamedTuple):
    """The loss, its terms before weighting, and outputs for the monitors."""

    # Scalars: cross_entropy + me_max_weight * me_max + entropy_weight * entropy, and its terms.
    loss: Tensor
    cross_entropy: Tensor  # mean H(target, anchor) over views and images, >= 0
    me_max: Tensor  # KL(mean anchor prediction || prior), >= 0; log K - H(mean) if it is uniform
    entropy: Tensor  # mean entropy of single anchor predictions, in [0, log K]
    targets: Tensor  # sharpened, optionally balanced, [B, K], rows sum to 1, no gradient
    mean_prediction: Tensor  # of anchors, over views, images and processes, [K], no gradient


def assign(projections: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of prototypes: log softmax of cosines over a temperature (paper section 3).

    Args:
        projections: [..., P], any scale.
        prototypes: [K, P], any scale.
        temperature: > 0; the paper's anchors use 0.1.

    Returns:
        [..., K], each row's exponentials sum to 1.
    """
    # The small factor is divided, not the [..., K] product.
    projections = F.normalize(projections, dim=-1) / temperature
    return torch.log_softmax(projections @ F.normalize(prototypes, dim=-1).T, dim=-1)


def sharpen(log_probs: Tensor, temperature: float | Tensor) -> Tensor:
    """Raise probabilities to 1/temperature and renormalise, in logs (paper section 3).

    Args:
        log_probs: log-probabilities, [..., K].
        temperature: in (0, 1]; smaller is sharper. 0.25 after an assignment at 0.1 is 0.025.

    Returns:
        Log-probabilities, [..., K]; the argmax of each row is unchanged.
    """
    return torch.log_softmax(log_probs / temperature, dim=-1)


def sinkhorn(log_probs: Tensor, iterations: int) -> Tensor:
    """Balance assignments over prototypes by Sinkhorn-Knopp, over the batch of all processes.

    Each iteration normalises the mass per prototype, then per image; so rows are exact and
    prototypes balanced up to convergence.

    Args:
        log_probs: log of positive scores, [B, K].
        iterations: >= 1; the paper uses 3.

    Returns:
        Log-probabilities, [B, K], rows sum to 1.
    """
    balanced = log_probs
    for _ in range(iterations):
        balanced = balanced - all_reduce_logsumexp(torch.logsumexp(balanced, dim=0))
        balanced = balanced - torch.logsumexp(balanced, dim=1, keepdim=True)
    return balanced


def log_mean_prediction(log_probs: Tensor) -> Tensor:
    """Log of the mean anchor prediction over views, images and processes.

    In logs, so that a prototype far from all images keeps its gradient where its probability would
    underflow.

    Args:
        log_probs: of this process's anchors, [V, B, K].

    Returns:
        Log-probabilities, [K].
    """
    views, images, _ = log_probs.shape
    local = torch.logsumexp(log_probs, dim=(0, 1)) - math.log(views * images)
    return all_reduce_logmeanexp(local)


def me_max(log_mean: Tensor, log_prior: Tensor) -> Tensor:
    """KL(mean prediction || prior) over prototypes, the regulariser that prevents collapse.

    MSN's uniform prior gives log K - H(mean prediction) (mean entropy maximisation, Eq. 1); a power
    law gives PMSN's regulariser.

    Args:
        log_mean: log of the mean prediction, finite, [K].
        log_prior: log-probabilities, finite, [K].

    Returns:
        Scalar >= 0, zero if and only if the two agree.
    """
    return (log_mean.exp() * (log_mean - log_prior)).sum()


def power_law_prior(num_prototypes: int, exponent: float) -> Tensor:
    """Prior proportional to k^-exponent for k = 1..K, [K] float64; exponent 0 is uniform (MSN).

    Raises:
        UserError: if the exponent is negative or not finite.
    """
    if not math.isfinite(exponent) or exponent < 0:
        raise UserError(f"method.prior_exponent must be >= 0 (0 is uniform), got {exponent}")
    weights = torch.arange(1, num_prototypes + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


class MSNLoss(nn.Module):
    """Cross-entropy of anchors against targets, me-max and, if weighted, entropy (Eq. 1).

    Args:
        temperature: of anchors and, before sharpening, of targets, > 0.
        me_max_weight: lambda, >= 0.
        entropy_weight: >= 0; the paper's recipe reports the term and weights it 0.
        use_sinkhorn: balance the sharpened targets over prototypes.
        sinkhorn_iterations: in [1, 1000].
        prior: probabilities of prototypes that the mean prediction is drawn to, [K]; None is
            uniform.

    Raises:
        UserError: if a number is out of its range.
    """

    log_prior: Tensor | None

    def __init__(
        self,
        *,
        temperature: float,
        me_max_weight: float,
        entropy_weight: float,
        use_sinkhorn: bool,
        sinkhorn_iterations: int,
        prior: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"method.temperature must be > 0, got {temperature}")
        for name, weight in {"me_max": me_max_weight, "entropy": entropy_weight}.items():
            if not weight >= 0:
                raise UserError(f"method.{name}_weight must be >= 0, got {weight}")
        if not 1 <= sinkhorn_iterations <= _MOST_ITERATIONS:
            raise UserError(
                f"method.sinkhorn_iterations must be in [1, {_MOST_ITERATIONS}], got "
                f"{sinkhorn_iterations}"
            )
        self.temperature = temperature
        self.me_max_weight, self.entropy_weight = me_max_weight, entropy_weight
        self.use_sinkhorn, self.sinkhorn_iterations = use_sinkhorn, sinkhorn_iterations
        if prior is not None and prior.device.type != "meta":
            _check_prior(prior)
        # Not persistent: it is a setting, and checkpoints hold weights.
        self.register_buffer("log_prior", None if prior is None else prior.log(), persistent=False)

    def forward(
        self, anchor: Tensor, target: Tensor, prototypes: Tensor, sharpen_temperature: float
    ) -> LossTerms:
        """The loss of one batch.

        Args:
            anchor: anchor projections, [V, B, P].
            target: target projections, [B, P]; no gradient flows into them.
            prototypes: [K, P]; trained through the anchors only.
            sharpen_temperature: in (0, 1], see `sharpen`.
        """
        # Autocast would compute the cosines in half precision.
        with torch.autocast(device_type=anchor.device.type, enabled=False):
            anchor, target, prototypes = (
                _at_least_float32(t) for t in (anchor, target, prototypes)
            )
            targets = self.targets(target, prototypes, sharpen_temperature)
            log_probs = assign(anchor, prototypes, self.temperature)  # [V, B, K]
            # All views share the targets, so views are averaged first.
            cross_entropy = -(targets * log_probs.mean(dim=0)).sum(dim=-1).mean()
            log_mean = log_mean_prediction(log_probs)
            regulariser = me_max(log_mean, self._log_prior(prototypes))
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.entropy_weight > 0):
                entropy = -(log_probs.exp() * log_probs).sum(dim=-1).mean()
            loss = cross_entropy + self.me_max_weight * regulariser + self.entropy_weight * entropy
        return LossTerms(
            loss, cross_entropy, regulariser, entropy, targets, log_mean.detach().exp()
        )

    @torch.no_grad()
    def targets(self, target: Tensor, prototypes: Tensor, sharpen_temperature: float) -> Tensor:
        """Sharpened, optionally balanced assignments of the target view, [B, P] -> [B, K]."""
        log_targets = sharpen(assign(target, prototypes, self.temperature), sharpen_temperature)
        if self.use_sinkhorn:
            log_targets = sinkhorn(log_targets, self.sinkhorn_iterations)
        return log_targets.exp()

    def _log_prior(self, prototypes: Tensor) -> Tensor:
        if self.log_prior is None:
            return prototypes.new_full((prototypes.shape[0],), -math.log(prototypes.shape[0]))
        if self.log_prior.shape[0] != prototypes.shape[0]:
            raise UserError(
                f"prior has {self.log_prior.shape[0]} entries for {prototypes.shape[0]} prototypes"
            )
        return self.log_prior.to(prototypes)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_prior(prior: Tensor) -> None:
    if not bool((prior > 0).all()) or abs(float(prior.sum()) - 1) > 1e-6:
        raise UserError("prior must be positive probabilities that sum to 1")
