"""Preconditioned L-BFGS for many convex problems side by side, each with its own step lengths.

Legend: P problems, N variables of each, M remembered steps.

One call of the objective serves all problems at once. A problem whose trial point is refused
halves its step (or better) while the others go on; solved problems leave the batch.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_ARMIJO = 1e-4
_SMALLEST_STEP = 1e-8


class Objective(Protocol):
    """P convex functions of N variables."""

    def evaluate(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values [P] in float64, gradients [P, N], positive diagonals like the Hessian's [P, N]."""

    def solved(self, values: Tensor, gradients: Tensor) -> Tensor:
        """Which problems are solved well enough, bool [P]."""

    def keep(self, problems: Tensor) -> "Objective":
        """The same functions for some of the problems, by index."""


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
    """Whether `Objective.solved` said so, bool [P]."""


@dataclass
class _State:
    """Running problems; every field has P first, steps and changes are [P, M, N]."""

    index: Tensor
    points: Tensor
    values: Tensor
    gradients: Tensor
    diagonals: Tensor
    directions: Tensor
    slopes: Tensor
    lengths: Tensor
    steps: Tensor
    changes: Tensor
    curvatures: Tensor  # 1 / <step, change>, 0 where there is no pair, [P, M]

    def keep(self, problems: Tensor) -> "_State":
        return _State(**{field.name: getattr(self, field.name)[problems] for field in fields(self)})


def minimise(objective: Objective, start: Tensor, *, memory: int, max_evaluations: int) -> Minimum:
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
        running = ~solved & (state.lengths > _SMALLEST_STEP) & (evaluations < max_evaluations)
        if not bool(running.all()):
            _store(result, state, ~running, solved, evaluations)
            left = torch.nonzero(running)[:, 0]
            if len(left) == 0:
                return result
            state, objective = state.keep(left), objective.keep(left)
        accepted = _advance(objective, state, slot)
        evaluations += 1
        slot = (slot + 1) % memory if bool(accepted.any()) else slot


def _begin(objective: Objective, start: Tensor, memory: int) -> _State:
    values, gradients, diagonals = objective.evaluate(start)
    directions = -gradients / diagonals
    problems, variables = start.shape
    return _State(
        index=torch.arange(problems, device=start.device),
        points=start,
        values=values,
        gradients=gradients,
        diagonals=diagonals,
        directions=directions,
        slopes=_dot(gradients, directions),
        lengths=torch.ones_like(values),
        steps=start.new_zeros(problems, memory, variables),
        changes=start.new_zeros(problems, memory, variables),
        curvatures=start.new_zeros(problems, memory),
    )


def _advance(objective: Objective, state: _State, slot: int) -> Tensor:
    """Try one point a problem; where it is accepted, move there and choose a new direction."""
    steps = state.directions * state.lengths[:, None].to(state.directions.dtype)
    points = state.points + steps
    values, gradients, diagonals = objective.evaluate(points)
    # Rounding of the values must not refuse the last steps, which change them by less than that.
    slack = torch.finfo(points.dtype).eps * state.values.abs()
    accepted = values <= state.values + _ARMIJO * state.lengths * state.slopes + slack
    shorter = _interpolate(state, values)
    column = accepted[:, None]
    changes = gradients - state.gradients
    curvatures = _dot(steps, changes)
    usable = accepted & (curvatures > 0)
    if bool(accepted.any()):
        # A refused problem forgets its oldest pair instead of keeping a ring of its own.
        state.steps[:, slot] = torch.where(usable[:, None], steps, 0)
        state.changes[:, slot] = torch.where(usable[:, None], changes, 0)
        state.curvatures[:, slot] = torch.where(usable, 1 / curvatures, 0).to(steps.dtype)
    state.points = torch.where(column, points, state.points)
    state.values = torch.where(accepted, values, state.values)
    state.gradients = torch.where(column, gradients, state.gradients)
    state.diagonals = torch.where(column, diagonals, state.diagonals)
    if bool(accepted.any()):
        directions = _direction(state, slot)
        state.directions = torch.where(column, directions, state.directions)
        state.slopes = torch.where(accepted, _dot(state.gradients, directions), state.slopes)
    state.lengths = torch.where(accepted, 1.0, shorter)
    return accepted


def _direction(state: _State, newest: int) -> Tensor:
    """The two-loop recursion, started from the diagonal scaled to the newest pair."""
    memory = state.steps.shape[1]
    order = [(newest - age) % memory for age in range(memory)]
    q = state.gradients.clone()
    shares = []
    for i in order:
        share = state.curvatures[:, i, None] * (state.steps[:, i] * q).sum(1, keepdim=True)
        q -= share * state.changes[:, i]
        shares.append(share)
    change = state.changes[:, newest]
    spread = _dot(change, change / state.diagonals)
    inner = 1 / state.curvatures[:, newest].to(spread.dtype)
    scale = torch.where(spread > 0, inner / spread, 1.0)
    q = q / state.diagonals * scale[:, None].to(q.dtype)
    for i, share in zip(reversed(order), reversed(shares), strict=True):
        back = state.curvatures[:, i, None] * (state.changes[:, i] * q).sum(1, keepdim=True)
        q += (share - back) * state.steps[:, i]
    return -q


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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1, dtype=torch.float64)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
