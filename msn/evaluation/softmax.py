"""The objective of softmax regression, its gradient and an estimate of its Hessian.

Legend: P problems, n rows, R coordinates, C classes, m rows of the largest class.

P problems are computed side by side. Blocks of rows run on threads, each of which computes alone:
torch's own parallel operations wait for their slowest thread every time, blocks only once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# Tensors with P first.
Curvature = tuple[Tensor, ...]
Item = TypeVar("Item")
Found = TypeVar("Found")


def in_threads(function: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """Results of a function for every item, in order, on as many threads as torch uses.

    Each item is computed by one thread, so results do not depend on the number of threads.
    """
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        # A thread also sets the number for new threads, which is undone here.
        torch.set_num_threads(before)


# Logits that a thread holds at once, so that they stay in its cache.
_CACHED_LOGITS = 2**18
# Logits held at once on an accelerator.
_DEVICE_LOGITS = 2**27
# Most logits that are kept for the search along a direction.
_MAX_SCORES = 2**27
# The search: slopes that are tried, and the share of the first slope that counts as flat.
_TRIALS = 6
_FLAT = 0.1
# Most shares of the rows: enough for many threads, few enough to keep a gradient for each.
_SHARES = 32
# Rows of a class up to which its own block of the Hessian is factorised.
_MOST_OWN_ROWS = 64


class Softmax(NamedTuple):
    """P objectives mean_i [logsumexp(W x_i) - w_{y_i} . x_i] + lambda/2 ||W||^2 of W [C, R]."""

    rows: Tensor
    """[P, n, R]; the preconditioner assumes uncorrelated coordinates."""
    labels: Tensor
    """[P, n]."""
    strengths: Tensor
    """lambda, float64 [P]."""
    variances: Tensor
    """Mean squares of the coordinates, [P, 1, R]."""
    label_sums: Tensor
    """Sums over the rows of each class, divided by n, [P, C, R]."""
    tolerance: float
    own_rows: Tensor | None
    """Rows of each class, [C, m], padded with n; only for a single problem, else None."""

    @classmethod
    def of(
        cls, rows: Tensor, labels: Tensor, strengths: Tensor, *, num_classes: int, tolerance: float
    ) -> "Softmax":
        """Prepare objectives; `tolerance` bounds (objective - optimum) / objective."""
        problems, count, rank = rows.shape
        sums = rows.new_zeros(problems, num_classes, rank)
        sums.scatter_add_(1, labels.unsqueeze(-1).expand(-1, -1, rank), rows)
        variances = rows.square().mean(dim=1, keepdim=True)
        own = _rows_of_classes(labels[0], num_classes) if problems == 1 else None
        own = own if own is None or own.shape[1] <= _MOST_OWN_ROWS else None
        return cls(rows, labels, strengths, variances, sums / count, tolerance, own)

    def keep(self, problems: Tensor) -> "Softmax":
        """Some of the problems, by index."""
        return Softmax(
            self.rows[problems],
            self.labels[problems],
            self.strengths[problems],
            self.variances[problems],
            self.label_sums[problems],
            self.tolerance,
            self.own_rows,
        )

    def solved(self, values: Tensor, gradients: Tensor) -> Tensor:
        """Whether strong convexity certifies the gap: ||g||^2 / (2 lambda) <= tolerance * value."""
        squares = gradients.square().sum(dim=1, dtype=torch.float64)
        return squares <= 2 * self.strengths * self.tolerance * values

    def scores(self, points: Tensor) -> Tensor:
        """Logits of all rows, [P, n, C]; empty, [P, 0, C], if they would not fit into memory."""
        problems, count, _ = self.rows.shape
        weight = points.view_as(self.label_sums)
        if problems * count * weight.shape[1] > _MAX_SCORES:
            return weight.new_empty(problems, 0, weight.shape[1])
        scores = weight.new_empty(problems, count, weight.shape[1])
        self._for_each(partial(_score, weight), self._shares(scores))
        return scores

    def evaluate(self, points: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Curvature]:
        """Values, gradients and curvature at points [P, C * R]."""
        count = self.rows.shape[1]
        weight = points.view_as(self.label_sums)
        size = self._rows_at_once()
        found = self._for_each(partial(_sums, weight, size), self._shares(scores))
        loss, gradient, mean, square, _ = found[0]
        for sums in found[1:]:  # in order, so that rounding is reproducible
            loss += sums.loss
            gradient += sums.gradient
            mean += sums.mean
            square += sums.square
        strengths = self.strengths.to(points.dtype)[:, None, None]
        gradient = gradient / count - self.label_sums + strengths * weight
        values = loss / count + self.strengths / 2 * dot(points, points)
        own_probs = torch.cat([sums.own_probs for sums in found], dim=1)
        curvature = self._curvature((mean - square) / count, own_probs)
        return values, gradient.flatten(1), curvature

    def search(
        self, points: Tensor, scores: Tensor, directions: Tensor, changes: Tensor, slopes: Tensor
    ) -> Tensor:
        """Step length at which the slope is nearly zero, by Newton's method in a bracket, [P].

        Without scores it is 1, which suits most steps of a preconditioned L-BFGS.
        """
        length = torch.ones_like(self.strengths)
        if scores.shape[1] == 0:
            return length
        across, along = dot(points, directions), dot(directions, directions)
        low, high = torch.zeros_like(length), torch.full_like(length, torch.inf)
        for _ in range(_TRIALS):
            slope, bend = self._slopes(scores, changes, length, across, along)
            found = slope.abs() <= _FLAT * slopes.abs()
            if bool(found.all()):
                return length
            low = torch.where(slope < 0, length, low)
            high = torch.where(slope > 0, length, high)
            newton = length - slope / bend
            inside = (newton > low) & (newton < torch.minimum(high, 10 * length))
            other = torch.where(high.isinf(), 4 * length, (low + high) / 2)
            length = torch.where(found, length, torch.where(inside, newton, other))
        return torch.where(found | (low == 0), length, low)

    def _slopes(
        self, scores: Tensor, changes: Tensor, lengths: Tensor, across: Tensor, along: Tensor
    ) -> tuple[Tensor, Tensor]:
        """First and second derivative along directions at some lengths, float64 [P] each."""
        shares = zip(self._shares(scores), self._shares(changes), strict=True)
        size = self._rows_at_once()
        parts = self._for_each(partial(_bends, lengths, size), [(a, b[2]) for a, b in shares])
        slope, bend = (sum(part[1:], part[0]) for part in zip(*parts, strict=True))
        count = self.rows.shape[1]
        slope = slope / count + self.strengths * (across + lengths * along)
        return slope, bend / count + self.strengths * along

    def _for_each(self, function: Callable[[Item], Found], shares: Sequence[Item]) -> list[Found]:
        """Results in order: on threads, or on an accelerator one after another."""
        if self.rows.device.type == "cpu":
            return in_threads(function, shares)
        return [function(share) for share in shares]

    def _shares(self, scores: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows, labels and scores (if there are any) in shares for the threads.

        The shares do not depend on the number of threads, so neither does rounding.
        """
        share = max(self._rows_at_once(), -(-self.rows.shape[1] // _SHARES))
        rows, labels = self.rows.split(share, dim=1), self.labels.split(share, dim=1)
        if scores is None or scores.shape[1] == 0:
            return [(x, y, None) for x, y in zip(rows, labels, strict=True)]
        return list(zip(rows, labels, scores.split(share, dim=1), strict=True))

    def _rows_at_once(self) -> int:
        problems, count, _ = self.rows.shape
        classes = self.label_sums.shape[1]
        if self.rows.device.type != "cpu":
            return max(1, min(count, _DEVICE_LOGITS // (problems * classes)))
        # Several problems are small: one block, with torch's own threads.
        return count if problems > 1 else max(1, min(count, _CACHED_LOGITS // classes))

    def _curvature(self, spread: Tensor, own_probs: Tensor) -> Curvature:
        """Diagonal [P, C, R]; with own rows these as well, scaled, and the Cholesky factor.

        Args:
            spread: mean over rows of p (1 - p), [P, C].
            own_probs: probability of the row's own class, [P, n].
        """
        strengths = self.strengths.to(spread.dtype)[:, None, None]
        if self.own_rows is None:
            return (spread.unsqueeze(-1) * self.variances + strengths,)
        weights = own_probs[0] * (1 - own_probs[0]) / own_probs.shape[1]  # [n]
        weights = torch.cat([weights, weights.new_zeros(1)])[self.own_rows]  # [C, m]
        others = (spread[0] - weights.sum(dim=1)).clamp_min(0)
        diagonal = others[:, None] * self.variances[0] + strengths[0]  # [C, R]
        last = self.rows.shape[1] - 1
        own = self.rows[0][self.own_rows.clamp_max(last)] * weights.sqrt().unsqueeze(-1)
        inner = (own / diagonal.unsqueeze(1)) @ own.mT
        inner.diagonal(dim1=1, dim2=2).add_(1)
        factor = torch.linalg.cholesky(inner)
        return diagonal.unsqueeze(0), own.unsqueeze(0), factor.unsqueeze(0)

    def precondition(self, curvature: Curvature, vectors: Tensor) -> Tensor:
        """Solve (diagonal + own^T own) z = v for each class (Woodbury), [P, C * R]."""
        diagonal = curvature[0]
        scaled = vectors.view_as(diagonal) / diagonal
        if self.own_rows is None:
            return scaled.flatten(1)
        _, own, factor = curvature
        inner = torch.cholesky_solve(own @ scaled.unsqueeze(-1), factor)  # [1, C, m, 1]
        return (scaled - (own.mT @ inner).squeeze(-1) / diagonal).flatten(1)


class _Sums(NamedTuple):
    """Sums over some rows of every problem."""

    loss: Tensor  # float64 [P]
    gradient: Tensor  # of p x^T, [P, C, R]
    mean: Tensor  # of p, [P, C]
    square: Tensor  # of p^2, [P, C]
    own_probs: Tensor  # not summed, [P, rows]


def _score(weight: Tensor, share: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Fill in the scores of a share."""
    rows, _, scores = share
    torch.matmul(rows, weight.mT, out=scores)


def _sums(weight: Tensor, size: int, share: tuple[Tensor, Tensor, Tensor | None]) -> _Sums:
    """Work through a share of rows, labels and scores, `size` rows at once."""
    rows, labels, scores = share
    loss = weight.new_zeros(len(weight), dtype=torch.float64)
    gradient = torch.zeros_like(weight)
    mean, square = weight.new_zeros(2, *weight.shape[:2])
    own_probs = []
    for at in range(0, rows.shape[1], size):
        x, y = rows[:, at : at + size], labels[:, at : at + size].unsqueeze(-1)
        logits = x @ weight.mT if scores is None else scores[:, at : at + size]  # [P, n, C]
        top = logits.amax(dim=-1, keepdim=True)
        loss -= logits.gather(-1, y).sum(dim=(1, 2), dtype=torch.float64)
        probs = (logits - top).exp_()
        total = probs.sum(dim=-1, keepdim=True)
        loss += (total.log() + top).sum(dim=(1, 2), dtype=torch.float64)
        probs /= total
        own_probs.append(probs.gather(-1, y).squeeze(-1))
        gradient.baddbmm_(probs.mT, x)
        mean += probs.sum(dim=1)
        square += probs.square_().sum(dim=1)
    return _Sums(loss, gradient, mean, square, torch.cat(own_probs, dim=1))


def _bends(
    lengths: Tensor, size: int, share: tuple[tuple[Tensor, Tensor, Tensor | None], Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Derivatives of the loss by the length, summed over a share: [P] each, float64."""
    (_, labels, scores), changes = share
    assert scores is not None
    assert changes is not None
    t = lengths.to(scores.dtype)[:, None, None]
    slope, bend = torch.zeros_like(lengths), torch.zeros_like(lengths)
    for at in range(0, labels.shape[1], size):
        change, y = changes[:, at : at + size], labels[:, at : at + size].unsqueeze(-1)
        logits = torch.addcmul(scores[:, at : at + size], change, t)  # [P, n, C]
        probs = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
        total = probs.sum(dim=-1)
        moved = probs.mul_(change)
        mean = moved.sum(dim=-1) / total  # of the change under p, [P, n]
        square = moved.mul_(change).sum(dim=-1) / total
        slope += mean.sum(dim=1, dtype=torch.float64)
        slope -= change.gather(-1, y).sum(dim=(1, 2), dtype=torch.float64)
        bend += (square - mean.square()).sum(dim=1, dtype=torch.float64)
    return slope, bend


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, [P, N] each -> float64 [P]."""
    return (a * b).sum(dim=1, dtype=torch.float64)


def _rows_of_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Row numbers by class, [n] -> [C, m], padded with n."""
    counts = torch.bincount(labels, minlength=num_classes)
    order = torch.argsort(labels, stable=True)
    first = counts.cumsum(0) - counts
    table = labels.new_full((num_classes, int(counts.max())), len(labels))
    within = torch.arange(len(labels), device=labels.device) - first[labels[order]]
    table[labels[order], within] = order
    return table
