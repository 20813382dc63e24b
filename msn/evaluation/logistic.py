"""L2-regularised multinomial logistic regression, solved to a certified optimum.

Legend: n labelled rows, D feature width, C classes, R = min(n, D) rank, S label sets of one size,
L regularisation strengths.

    objective(W) = 1/n sum_i [logsumexp(W x_i) - w_{y_i} . x_i] + lambda/2 ||W||^2

It is lambda-strongly convex, so a gradient g proves objective - optimum <= ||g||^2 / (2 lambda).
That bound, relative to the objective, is the convergence test; nothing stops early by default.

Weights lie in the span of the rows, so the solver works in the R coordinates of their principal
axes; with few labels R is tiny. L-BFGS is preconditioned by an estimate of the Hessian: its
diagonal in these coordinates (variance of the axis times the class's mean p (1 - p), plus lambda)
and, for large problems with few rows per class, the exact share of each class's own rows,
p (1 - p) x x^T.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msn.errors import UserError
from msn.evaluation.softmax import Softmax
from msn.evaluation.solver import Minimum, minimise

log = logging.getLogger(__name__)

# Multiplications of a product up to which double precision is used from the start.
_SMALL = 2**27
# Logits of all problems that are solved side by side.
_SIDE_BY_SIDE = 2**23
_MEMORY = 10  # steps that L-BFGS remembers


class LogisticFit(NamedTuple):
    """Classifiers and the proof that they are optimal."""

    weight: Tensor
    """[S, L, C, D], in the dtype of the rows."""
    objective: Tensor
    """float64 [S, L]."""
    gradient_norm: Tensor
    """Euclidean norm of the objective's gradient at `weight`, float64 [S, L]."""
    evaluations: Tensor
    """Passes over the rows, [S, L]."""
    converged: Tensor
    """Whether the certified relative gap is within the tolerance, bool [S, L]."""


def centre_and_normalise(rows: Tensor) -> Tensor:
    """Subtract each row's own mean and divide by its length (paper A.2), [..., D] -> [..., D].

    Rows that are constant become zero.
    """
    return F.normalize(rows - rows.mean(dim=-1, keepdim=True), dim=-1)


def fit_logistic(
    rows: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    lambdas: Sequence[float] | Tensor,
    tolerance: float,
    max_evaluations: int,
    dtype: torch.dtype | None = None,
) -> LogisticFit:
    """Fit a classifier for every label set and every lambda.

    Args:
        rows: features of S label sets of one size, [S, n, D], centred and normalised, on a device
            that has float64.
        labels: in [0, C), [S, n].
        num_classes: C >= 2; classes without a row are allowed.
        lambdas: regularisation of the mean loss, each > 0: L for all sets, or of each, [S, L]. The
            paper's `lambd` is lambda * n.
        tolerance: certified (objective - optimum) / objective, > 0.
        max_evaluations: passes over the rows; a warning says if they were too few.
        dtype: of the computation; None takes float64 for small problems, for large ones float32 and
            then, where rounding stops it early, float64.

    Raises:
        UserError: numbers out of range, a single class, or rows that are not finite.
    """
    strengths = torch.as_tensor(lambdas, dtype=torch.float64)
    _check(rows, labels, num_classes, strengths, tolerance)
    strengths = strengths.expand(len(rows), -1).to(rows.device)
    solver = _Solver(num_classes, tolerance, max_evaluations, dtype)
    together = _SIDE_BY_SIDE // (rows.shape[1] * num_classes * strengths.shape[1])
    fit_some = solver.side_by_side if together >= 1 else solver.in_turn
    chunks = (part.split(max(1, together)) for part in (rows, labels, strengths))
    with matmul_precision("highest"):  # whatever the trainer chose; TF32 keeps 10 bits
        fits = [fit_some(*some) for some in zip(*chunks, strict=True)]
    fit = LogisticFit(*(torch.cat(parts) for parts in zip(*fits, strict=True)))
    _warn_unless_converged(fit, max_evaluations)
    return fit


def principal_coordinates(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of rows on their (uncentred) principal axes, exact for classifiers in their span.

    Args:
        rows: [S, n, D].

    Returns:
        Coordinates [S, n, R] in the dtype of the rows, R = min(n, D), and the map back [S, R, D]:
        coordinates @ map = rows, and weights map like rows.
    """
    count, width = rows.shape[-2:]
    double = rows.to(torch.float64)
    if width <= count:
        axes = torch.linalg.eigh(double.mT @ double).eigenvectors  # [S, D, R]
        return rows @ axes.to(rows.dtype), axes.mT.to(rows.dtype)
    squares, left = torch.linalg.eigh(double @ double.mT)
    lengths = squares.clamp_min(0).sqrt().unsqueeze(-2)  # [S, 1, n]
    # Axes of zero length carry no weight: their inverse is set to zero.
    floor = lengths.amax(dim=-1, keepdim=True) * torch.finfo(torch.float64).eps ** 0.5
    inverse = torch.where(lengths > floor, 1 / lengths, 0)
    back = (left * inverse).mT @ double
    return (left * lengths).to(rows.dtype), back.to(rows.dtype)


class _Solver:
    """Settings of a fit, and two ways to run it: all problems together, or one by one."""

    def __init__(
        self, num_classes: int, tolerance: float, max_evaluations: int, dtype: torch.dtype | None
    ) -> None:
        self.num_classes, self.tolerance = num_classes, tolerance
        self.max_evaluations, self.dtype = max_evaluations, dtype

    def side_by_side(self, rows: Tensor, labels: Tensor, lambdas: Tensor) -> LogisticFit:
        """All sets and lambdas [S, L] as one batch: [S, n, D] -> fits [S, L]."""
        coordinates, back = principal_coordinates(rows.to(torch.float64))
        copies = lambdas.shape[1]
        found = self._minimise(
            coordinates.repeat_interleave(copies, dim=0),
            labels.repeat_interleave(copies, dim=0),
            lambdas.flatten(),
            None,
        )
        points = found.points.view(len(rows), copies, self.num_classes, -1)
        weight = points.to(back.dtype) @ back.unsqueeze(1)
        shape = (len(rows), copies)
        return LogisticFit(weight.to(rows.dtype), *(part.view(shape) for part in found[1:]))

    def in_turn(self, rows: Tensor, labels: Tensor, lambdas: Tensor) -> LogisticFit:
        """One set, lambdas [1, L] from strong to weak, each started from the last: fits [1, L]."""
        coordinates, back = principal_coordinates(rows)
        fits: dict[float, Minimum] = {}
        start: Tensor | None = None
        for strength in sorted(set(lambdas[0].tolist()), reverse=True):
            fits[strength] = self._minimise(
                coordinates, labels, lambdas.new_tensor([strength]), start
            )
            start = fits[strength].points
        found = Minimum(
            *(
                torch.cat(parts)
                for parts in zip(*(fits[v] for v in lambdas[0].tolist()), strict=True)
            )
        )
        points = found.points.view(1, lambdas.shape[1], self.num_classes, -1)
        weight = points.to(back.dtype) @ back.unsqueeze(1)
        return LogisticFit(weight.to(rows.dtype), *(part.unsqueeze(0) for part in found[1:]))

    def _minimise(
        self, rows: Tensor, labels: Tensor, strengths: Tensor, start: Tensor | None
    ) -> Minimum:
        """P problems: rows [P, n, R], labels [P, n], strengths [P], start [P, C * R] or zero."""
        if start is None:
            start = rows.new_zeros(len(rows), self.num_classes * rows.shape[-1])
        spent = 0
        for dtype, _ in groupby(self._precisions(rows)):
            objective = Softmax.of(
                rows.to(dtype),
                labels,
                strengths,
                num_classes=self.num_classes,
                tolerance=self.tolerance,
            )
            left = self.max_evaluations - spent
            found = minimise(objective, start.to(dtype), memory=_MEMORY, max_evaluations=left)
            found = found._replace(evaluations=found.evaluations + spent)
            start, spent = found.points, int(found.evaluations.max())
            if bool(found.solved.all()) or spent >= self.max_evaluations:
                break
        return found

    def _precisions(self, rows: Tensor) -> tuple[torch.dtype, ...]:
        if self.dtype is not None:
            return (self.dtype,)
        small = rows.numel() * self.num_classes <= _SMALL
        return (torch.float64,) if small else (rows.dtype, torch.float64)


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Within, float32 products have this level of `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _warn_unless_converged(fit: LogisticFit, max_evaluations: int) -> None:
    left = ~fit.converged
    if bool(left.any()):
        log.warning(
            "logistic regression: %d of %d fits did not converge (%d evaluations of at most %d, "
            "largest gradient norm %.1e)",
            int(left.sum()),
            left.numel(),
            int(fit.evaluations[left].max()),
            max_evaluations,
            float(fit.gradient_norm[left].max()),
        )


def _check(
    rows: Tensor, labels: Tensor, num_classes: int, lambdas: Tensor, tolerance: float
) -> None:
    if num_classes < 2:
        raise UserError(f"logistic regression needs at least 2 classes, got {num_classes}")
    if lambdas.numel() == 0 or not bool((lambdas > 0).all()):
        raise UserError(f"lambda must be > 0, got {lambdas.tolist()}")
    if not tolerance > 0:
        raise UserError(f"tolerance must be > 0, got {tolerance}")
    if rows.shape[1] == 0:
        raise UserError("logistic regression needs at least one labelled image, got none")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise UserError(
            f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}"
        )
    if not bool(torch.isfinite(rows).all()):
        raise UserError("features hold NaN or infinite values")
