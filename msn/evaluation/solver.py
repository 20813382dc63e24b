"""Preconditioned L-BFGS for many softmax regressions side by side, each with its own step length.

Legend: P problems, N variables of each problem, M remembered steps.

One call of the objective serves all problems. Step lengths come from a search along the direction,
which is cheap because the scores are linear in the point. A problem whose point is still refused
shortens its step while the others continue. Solved problems leave the batch.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from msn.evaluation.softmax import Curvature, Softmax, dot

_ARMIJO = 1e-4
_SMALLEST_STEP = 1e-8
# Relative rounding of values, which are sums in float64.
_VALUE_ROUNDING = 1e-14
# Steps after which scores are recomputed instead of updated.
_REFRESH = 8
# Points without gain after which a problem is given up: rounding stops it.
_IDLE = 20


class Minimum(NamedTuple):
    """Results of all problems, in their original order."""

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
        The best points; `solved` is False where rounding or the limit stopped a problem early.
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
        slopes=dot(gradients, directions),
        lengths=torch.full_like(values, torch.nan),
        flattest=_norms(gradients),
        idle=torch.zeros_like(values),
        steps=start.new_zeros(problems, memory, variables),
        changes=start.new_zeros(problems, memory, variables),
        inverses=start.new_zeros(problems, memory),
    )


def _advance(objective: Softmax, state: _State, slot: int) -> Tensor:
    """Try one point per problem; where it is accepted, move there and choose a new direction."""
    changes = objective.scores(state.directions)
    found = objective.search(state.points, state.scores, state.directions, changes, state.slopes)
    state.lengths = torch.where(state.lengths.isnan(), found, state.lengths)
    lengths = state.lengths.to(state.points.dtype)
    steps = state.directions * lengths[:, None]
    points = state.points + steps
    scores = changes.mul_(_along(lengths, changes)).add_(state.scores)
    values, gradients, curvature = objective.evaluate(points, scores)
    # The last steps change values by less than their rounding, which must not refuse them.
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
    products = dot(steps, differences)
    # A refused problem forgets its oldest pair, so that all share one ring.
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
    state.slopes = _choose(accepted, dot(state.gradients, directions), state.slopes)
    return accepted


def _direction(objective: Softmax, state: _State, newest: int) -> Tensor:
    """The two-loop recursion, started from the preconditioner scaled to the newest pair.

    Each loop is a triangular system in the M coefficients, so a few matrix products replace several
    small operations per pair.
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
    spread = dot(change, objective.precondition(state.curvature, change))
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
    """A value per problem, [P], in a shape that broadcasts with [P, ...]."""
    return of_problems.view(-1, *[1] * (like.ndim - 1))


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
