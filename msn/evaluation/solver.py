"""Preconditioned L-BFGS for many softmax regressions side by side, each with its own step length.

Legend: P problems, n rows, R coordinates, C classes, N = C R variables of each problem, M
remembered steps, m rows of the largest class.

One call of the objective serves all problems at once. Step lengths come from a search along the
direction, which is cheap because the objective depends on the point through linear scores; a
problem whose point is refused all the same shortens its step while the others go on, and solved
problems leave the batch.

Blocks of rows run on threads that each compute alone: parallel operations of torch wait for their
slowest thread each time, blocks wait for each other once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
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

    Each item is computed by one thread whatever their number, so results do not depend on it.
    """
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        # A thread sets its own number and that of threads to come; only the first is wanted.
        torch.set_num_threads(before)


# Logits held at once by a thread: they stay in its cache while they are worked on.
_CACHED_LOGITS = 2**18
# Logits held at once on an accelerator.
_DEVICE_LOGITS = 2**27
# Logits of all rows that are kept at most, for the search along a direction.
_MAX_SCORES = 2**27
# The search: slopes looked at, and the part of the first slope that counts as flat.
_TRIALS = 6
_FLAT = 0.1
# Shares of the rows at most: enough for many threads, few enough to keep a gradient for each.
_SHARES = 32
# Rows of a class up to which its own block of the Hessian is worth its factorisation.
_MOST_OWN_ROWS = 64


class Softmax(NamedTuple):
    """P objectives mean_i [logsumexp(W x_i) - w_{y_i} . x_i] + lambda/2 ||W||^2 of W [C, R]."""

    rows: Tensor
    """[P, n, R]; the coordinates should be uncorrelated, which the preconditioner supposes."""
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
    """Which rows each class has, [C, m], padded with n; for a single problem or None."""

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
        """Logits of all rows, [P, n, C]; none, [P, 0, C], where they would not fit in memory."""
        problems, count, _ = self.rows.shape
        weight = points.view_as(self.label_sums)
        if problems * count * weight.shape[1] > _MAX_SCORES:
            return weight.new_empty(problems, 0, weight.shape[1])
        scores = weight.new_empty(problems, count, weight.shape[1])
        in_threads(partial(_score, weight), self._shares(scores))
        return scores

    def evaluate(self, points: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Curvature]:
        """Values, gradients and curvature at points [P, C * R]."""
        count = self.rows.shape[1]
        weight = points.view_as(self.label_sums)
        size = self._rows_at_once()
        found = in_threads(partial(_sums, weight, size), self._shares(scores))
        loss, gradient, mean, square, _ = found[0]
        for sums in found[1:]:  # in order, so that rounding is the same every time
            loss += sums.loss
            gradient += sums.gradient
            mean += sums.mean
            square += sums.square
        strengths = self.strengths.to(points.dtype)[:, None, None]
        gradient = gradient / count - self.label_sums + strengths * weight
        values = loss / count + self.strengths / 2 * _dot(points, points)
        own_probs = torch.cat([sums.own_probs for sums in found], dim=1)
        curvature = self._curvature((mean - square) / count, own_probs)
        return values, gradient.flatten(1), curvature

    def search(
        self,
        points: Tensor,
        scores: Tensor,
        directions: Tensor,
        changes: Tensor,
        slopes: Tensor,
    ) -> Tensor:
        """Where the slope along each direction is nearly zero, by Newton's method in a bracket.

        Without scores the length is 1, which suits most steps of a preconditioned L-BFGS.
        """
        length = torch.ones_like(self.strengths)
        if scores.shape[1] == 0:
            return length
        across, along = _dot(points, directions), _dot(directions, directions)
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
        parts = in_threads(partial(_bends, lengths, size), [(a, b[2]) for a, b in shares])
        slope, bend = (sum(part[1:], part[0]) for part in zip(*parts, strict=True))
        count = self.rows.shape[1]
        slope = slope / count + self.strengths * (across + lengths * along)
        return slope, bend / count + self.strengths * along

    def _shares(self, scores: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows, labels and scores (where there are any) in shares, one for a thread.

        How rows are shared out does not depend on the threads, so neither does rounding.
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
        # Problems side by side are small, and many: one block, with torch's own threads.
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


def _dot(a: Tensor, b: Tensor) -> Tensor:
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


_ARMIJO = 1e-4
_SMALLEST_STEP = 1e-8
# Relative rounding of values, which are sums in float64.
_VALUE_ROUNDING = 1e-14
# Steps after which scores are computed afresh instead of carried along.
_REFRESH = 8
# Points without any gain after which rounding has the last word.
_IDLE = 20


class Minimum(NamedTuple):
    """What was found, for every problem in its original place."""

    points: Tensor
    """[P, N]."""
    values: Tensor
    """float64 [P]."""
    gradient_norms: Tensor
    """Euclidean, at `points`, float64 [P]."""
    evaluations: Tensor
    """Calls of the objective until each was solved or given up, [P]."""
    solved: Tensor
    """Whether `Softmax.solved` said so, bool [P]."""


@dataclass
class _State:
    """Running problems; every field has P first, steps and changes are [P, M, N]."""

    index: Tensor
    points: Tensor
    scores: Tensor
    values: Tensor
    gradients: Tensor
    curvature: Curvature
    directions: Tensor
    slopes: Tensor
    lengths: Tensor  # to try next; NaN before the search along a new direction, [P]
    flattest: Tensor  # smallest gradient norm so far, [P]
    idle: Tensor  # points since values or gradients became smaller, [P]
    steps: Tensor
    changes: Tensor
    inverses: Tensor  # 1 / <step, change>, 0 where there is no pair, [P, M]

    def keep(self, problems: Tensor) -> "_State":
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        curvature = tuple(part[problems] for part in kept.pop("curvature"))
        return _State(**{name: part[problems] for name, part in kept.items()}, curvature=curvature)


def minimise(objective: Softmax, start: Tensor, *, memory: int, max_evaluations: int) -> Minimum:
    """Minimise all problems from a starting point.

    Args:
        objective: the functions.
        start: [P, N]; its dtype is that of the work.
        memory: steps to remember, >= 1.
        max_evaluations: calls of the objective after which unsolved problems are given up.

    Returns:
        The best points; `solved` tells which problems rounding or the limit stopped early.
    """
    state = _begin(objective, start, memory)
    result = Minimum(
        start.clone(),
        state.values.clone(),
        _norms(state.gradients),
        torch.ones(len(start), dtype=torch.long, device=start.device),
        torch.zeros(len(start), dtype=torch.bool, device=start.device),
    )
    evaluations, slot = 1, 0
    while True:
        solved = objective.solved(state.values, state.gradients)
        stuck = (state.lengths <= _SMALLEST_STEP) | (state.idle > _IDLE)
        running = ~solved & ~stuck & (evaluations < max_evaluations)
        if not bool(running.all()):
            _store(result, state, ~running, solved, evaluations)
            left = torch.nonzero(running)[:, 0]
            if len(left) == 0:
                return result
            state, objective = state.keep(left), objective.keep(left)
        if evaluations % _REFRESH == 0:
            state.scores = objective.scores(state.points)
        accepted = _advance(objective, state, slot)
        evaluations += 1
        slot = (slot + 1) % memory if bool(accepted.any()) else slot


def _begin(objective: Softmax, start: Tensor, memory: int) -> _State:
    scores = objective.scores(start)
    values, gradients, curvature = objective.evaluate(start, scores)
    directions = -objective.precondition(curvature, gradients)
    problems, variables = start.shape
    return _State(
        index=torch.arange(problems, device=start.device),
        points=start,
        scores=scores,
        values=values,
        gradients=gradients,
        curvature=curvature,
        directions=directions,
        slopes=_dot(gradients, directions),
        lengths=torch.full_like(values, torch.nan),
        flattest=_norms(gradients),
        idle=torch.zeros_like(values),
        steps=start.new_zeros(problems, memory, variables),
        changes=start.new_zeros(problems, memory, variables),
        inverses=start.new_zeros(problems, memory),
    )


def _advance(objective: Softmax, state: _State, slot: int) -> Tensor:
    """Try one point a problem; where it is accepted, move there and choose a new direction."""
    changes = objective.scores(state.directions)
    found = objective.search(state.points, state.scores, state.directions, changes, state.slopes)
    state.lengths = torch.where(state.lengths.isnan(), found, state.lengths)
    lengths = state.lengths.to(state.points.dtype)
    steps = state.directions * lengths[:, None]
    points = state.points + steps
    scores = changes.mul_(_along(lengths, changes)).add_(state.scores)
    values, gradients, curvature = objective.evaluate(points, scores)
    # Rounding of the values must not refuse the last steps, which change them by less than that.
    slack = max(torch.finfo(points.dtype).eps, _VALUE_ROUNDING) * state.values.abs()
    accepted = values <= state.values + _ARMIJO * state.lengths * state.slopes + slack
    norms = _norms(gradients)
    gain = accepted & ((values < state.values - slack) | (norms < 0.9 * state.flattest))
    state.idle = torch.where(gain, 0, state.idle + 1)
    state.flattest = torch.where(accepted, torch.minimum(norms, state.flattest), state.flattest)
    state.lengths = torch.where(accepted, torch.nan, _interpolate(state, values))
    if not bool(accepted.any()):
        return accepted
    differences = gradients - state.gradients
    products = _dot(steps, differences)
    # A refused problem forgets its oldest pair instead of keeping a ring of its own.
    usable = accepted & (products > 0)
    state.steps[:, slot] = _choose(usable, steps, torch.zeros_like(steps))
    state.changes[:, slot] = _choose(usable, differences, torch.zeros_like(differences))
    state.inverses[:, slot] = torch.where(usable, 1 / products, 0).to(steps.dtype)
    state.points = _choose(accepted, points, state.points)
    state.scores = _choose(accepted, scores, state.scores)
    state.values = _choose(accepted, values, state.values)
    state.gradients = _choose(accepted, gradients, state.gradients)
    state.curvature = tuple(
        _choose(accepted, new, old) for new, old in zip(curvature, state.curvature, strict=True)
    )
    directions = _direction(objective, state, slot)
    state.directions = _choose(accepted, directions, state.directions)
    state.slopes = _choose(accepted, _dot(state.gradients, directions), state.slopes)
    return accepted


def _direction(objective: Softmax, state: _State, newest: int) -> Tensor:
    """The two-loop recursion, started from the preconditioner scaled to the newest pair.

    Each loop is a triangular system in the M coefficients, so a few products of matrices do what
    would be several small operations for every pair.
    """
    memory = state.steps.shape[1]
    order = [(newest - age) % memory for age in range(memory)]  # newest first
    empty = state.inverses[:, order] == 0
    diagonal = torch.where(empty, 1, 1 / state.inverses[:, order])  # <s_i, y_i>, [P, M]
    products = (state.steps @ state.changes.mT)[:, order][:, :, order]  # <s_i, y_j>
    lower = products.tril(-1) + torch.diag_embed(diagonal)
    right = _apply(state.steps, state.gradients)[:, order]
    first = torch.linalg.solve_triangular(lower, right.unsqueeze(-1), upper=False).squeeze(-1)
    q = state.gradients - _combine(first, state.changes, order)
    change = state.changes[:, newest]
    spread = _dot(change, objective.precondition(state.curvature, change))
    scale = torch.where(spread > 0, diagonal[:, 0].to(spread.dtype) / spread, 1.0)
    q = objective.precondition(state.curvature, q) * scale[:, None].to(q.dtype)
    right = diagonal * first - _apply(state.changes, q)[:, order]
    second = torch.linalg.solve_triangular(lower.mT, right.unsqueeze(-1), upper=True).squeeze(-1)
    return -q - _combine(second, state.steps, order)


def _apply(pairs: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of vectors [P, N] with remembered ones [P, M, N] -> [P, M]."""
    return (pairs @ vectors.unsqueeze(-1)).squeeze(-1)


def _combine(coefficients: Tensor, pairs: Tensor, order: list[int]) -> Tensor:
    """Sum of remembered vectors with coefficients [P, M] in the given order -> [P, N]."""
    placed = torch.empty_like(coefficients)
    placed[:, order] = coefficients
    return (placed.unsqueeze(1) @ pairs).squeeze(1)


def _interpolate(state: _State, values: Tensor) -> Tensor:
    """Minimum of the parabola through old value, old slope and refused value, within [.1, .5]."""
    rise = values - state.values - state.lengths * state.slopes
    best = -state.slopes * state.lengths.square() / (2 * rise)
    best = torch.where(torch.isfinite(best), best, 0.1 * state.lengths)
    return torch.minimum(torch.maximum(best, 0.1 * state.lengths), 0.5 * state.lengths)


def _store(result: Minimum, state: _State, which: Tensor, solved: Tensor, evaluations: int) -> None:
    index = state.index[which]
    result.points[index] = state.points[which]
    result.values[index] = state.values[which]
    result.gradient_norms[index] = _norms(state.gradients[which])
    result.evaluations[index] = evaluations
    result.solved[index] = solved[which]


def _choose(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """New rows where `which`, old ones elsewhere."""
    if bool(which.all()):
        return new
    return torch.where(_along(which, new), new, old)


def _along(of_problems: Tensor, like: Tensor) -> Tensor:
    """A value a problem, [P], in a shape that broadcasts with [P, ...]."""
    return of_problems.view(-1, *[1] * (like.ndim - 1))


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
