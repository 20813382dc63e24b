import pytest
import torch
import torch.nn.functional as F

from msn.evaluation import solver
from msn.evaluation.solver import Softmax, minimise
from tests.evaluation.toys import unit_rows

N, D, C = 30, 5, 4
LAMBDA = 0.03


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(C, (N,), generator=generator)
    weight = torch.randn(1, C * D, generator=generator, dtype=torch.float64)
    return unit_rows(N, D), labels, weight


def objective(rows, labels, copies=1):
    strengths = torch.full((copies,), LAMBDA, dtype=torch.float64)
    return Softmax.of(
        rows.expand(copies, -1, -1),
        labels.expand(copies, -1),
        strengths,
        num_classes=C,
        tolerance=1e-6,
    )


def loss_of(flat, rows, labels):
    weight = flat.view(C, D)
    return F.cross_entropy(rows @ weight.T, labels) + LAMBDA / 2 * weight.square().sum()


def test_value_and_gradient_are_those_of_the_definition(problem):
    rows, labels, weight = problem
    ours = objective(rows, labels)
    values, gradients, _ = ours.evaluate(weight, ours.scores(weight))
    flat = weight[0].clone().requires_grad_()
    loss = loss_of(flat, rows, labels)
    (expected,) = torch.autograd.grad(loss, flat)
    torch.testing.assert_close(values[0], loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[0], expected, rtol=0, atol=1e-13)


def test_blocks_and_missing_scores_change_nothing(problem, monkeypatch):
    rows, labels, weight = problem
    whole = objective(rows, labels)
    expected = whole.evaluate(weight, whole.scores(weight))
    monkeypatch.setattr(solver, "_CACHED_LOGITS", 3 * C)  # three rows at once
    monkeypatch.setattr(solver, "_SHARES", 4)
    kept = whole.evaluate(weight, whole.scores(weight))
    monkeypatch.setattr(solver, "_MAX_SCORES", 1)
    assert whole.scores(weight).shape == (1, 0, C)
    without = whole.evaluate(weight, whole.scores(weight))
    for found in (kept, without):
        for ours, theirs in zip(
            [*found[:2], *found[2]], [*expected[:2], *expected[2]], strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_search_finds_the_lowest_point_along_a_line(problem):
    rows, labels, weight = problem
    ours = objective(rows, labels)
    scores = ours.scores(weight)
    _, gradients, _ = ours.evaluate(weight, scores)
    for length in (0.3, 3.0, 40.0):  # the best step is far from 1 in both directions
        directions = -gradients * length
        slopes = (gradients * directions).sum(dim=1)
        found = ours.search(weight, scores, directions, ours.scores(directions), slopes)
        flat = (weight + found * directions)[0].requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(flat, rows, labels), flat)
        assert abs(float(gradient @ directions[0])) <= 0.1 * abs(float(slopes[0]))


def test_preconditioner_solves_the_hessian_of_own_rows_and_a_diagonal_for_the_others(problem):
    rows, labels, weight = problem
    ours = objective(rows, labels)
    _, _, curvature = ours.evaluate(weight, ours.scores(weight))
    vectors = torch.randn(1, C * D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    solved = ours.precondition(curvature, vectors).view(C, D)
    probs = (rows @ weight.view(C, D).T).softmax(dim=1)
    spread = probs * (1 - probs)
    for c in range(C):
        own = labels == c
        hessian = (rows[own].T * spread[own, c]) @ rows[own] / N
        others = spread[~own, c].sum() / N * rows.square().mean(dim=0)
        hessian = hessian + torch.diag(others + LAMBDA)
        torch.testing.assert_close(hessian @ solved[c], vectors.view(C, D)[c], rtol=0, atol=1e-12)


def test_preconditioner_of_problems_side_by_side_is_the_diagonal(problem):
    rows, labels, weight = problem
    ours = objective(rows, labels, copies=2)
    points = torch.cat([weight, 2 * weight])
    _, _, curvature = ours.evaluate(points, ours.scores(points))
    for i in range(2):
        probs = (rows @ points[i].view(C, D).T).softmax(dim=1)
        spread = (probs * (1 - probs)).mean(dim=0)
        expected = spread[:, None] * rows.square().mean(dim=0) + LAMBDA
        vectors = torch.ones(2, C * D, dtype=torch.float64)
        found = ours.precondition(curvature, vectors)[i].view(C, D)
        torch.testing.assert_close(found, 1 / expected, rtol=1e-12, atol=0)


def test_number_of_threads_does_not_change_a_digit(problem, monkeypatch):
    rows, labels, weight = problem
    monkeypatch.setattr(solver, "_CACHED_LOGITS", 3 * C)
    ours = objective(rows.float(), labels)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            points = weight.float()
            found.append(ours.evaluate(points, ours.scores(points))[1])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


def test_solved_means_that_strong_convexity_certifies_the_gap(problem):
    rows, labels, _ = problem
    ours = objective(rows, labels)
    value = torch.tensor([2.0], dtype=torch.float64)
    edge = (2 * LAMBDA * 1e-6 * 2.0) ** 0.5
    for norm, expected in ((0.99 * edge, True), (1.01 * edge, False)):
        gradient = torch.zeros(1, C * D, dtype=torch.float64)
        gradient[0, 0] = norm
        assert bool(ours.solved(value, gradient)) is expected


class Quadratics:
    """1/2 (x - m)^T A (x - m) + f, with what `minimise` asks for; step lengths are exact."""

    def __init__(self, matrices, optima, *, exact=True, tolerance=1e-20):
        self.matrices, self.optima = matrices, optima
        self.exact, self.tolerance, self.calls = exact, tolerance, 0

    def scores(self, points):
        return points.clone()

    def evaluate(self, points, scores):
        torch.testing.assert_close(points, scores)  # carried along correctly
        self.calls += 1
        away = points - self.optima
        gradients = (self.matrices @ away.unsqueeze(-1)).squeeze(-1)
        diagonals = self.matrices.diagonal(dim1=1, dim2=2)
        return 1 + 0.5 * (away * gradients).sum(dim=1), gradients, (diagonals,)

    def search(self, points, scores, directions, changes, slopes):
        if not self.exact:
            return torch.full_like(slopes, 64.0)  # far too long: every step is refused at first
        bends = (directions.unsqueeze(1) @ self.matrices @ directions.unsqueeze(-1)).flatten()
        return -slopes / bends

    def precondition(self, curvature, vectors):
        return vectors / curvature[0]

    def solved(self, values, gradients):
        return gradients.square().sum(dim=1) <= self.tolerance

    def keep(self, problems):
        return Quadratics(
            self.matrices[problems],
            self.optima[problems],
            exact=self.exact,
            tolerance=self.tolerance,
        )


def random_quadratics(count=4, size=6, **settings):
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    # Problems of very different condition leave the batch at different times.
    scale = torch.tensor([1.0, 0.1, 1e-2, 10.0], dtype=torch.float64)[:count]
    matrices = roots @ roots.mT + scale[:, None, None] * torch.eye(size, dtype=torch.float64)
    optima = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return Quadratics(matrices, optima, **settings)


def test_quadratics_are_minimised():
    problems = random_quadratics()
    found = minimise(problems, torch.zeros_like(problems.optima), memory=8, max_evaluations=200)
    assert bool(found.solved.all())
    torch.testing.assert_close(found.points, problems.optima, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.values, torch.ones(4, dtype=torch.float64))


def test_exact_steps_solve_a_quadratic_in_as_many_steps_as_variables():
    # L-BFGS with exact steps and enough memory makes conjugate directions.
    problems = random_quadratics(count=1, tolerance=1e-16)
    found = minimise(problems, torch.zeros_like(problems.optima), memory=8, max_evaluations=50)
    assert int(found.evaluations[0]) <= 1 + 6 + 1


def test_problems_side_by_side_end_where_they_end_alone():
    problems = random_quadratics()
    start = torch.zeros_like(problems.optima)
    together = minimise(problems, start, memory=5, max_evaluations=200)
    for i in range(4):
        one = problems.keep(torch.tensor([i]))
        alone = minimise(one, start[:1], memory=5, max_evaluations=200)
        torch.testing.assert_close(together.points[i], alone.points[0], rtol=0, atol=1e-8)


def test_steps_that_are_too_long_are_shortened():
    problems = random_quadratics(exact=False)
    found = minimise(problems, torch.zeros_like(problems.optima), memory=8, max_evaluations=2000)
    torch.testing.assert_close(found.points, problems.optima, rtol=0, atol=1e-6)


def test_what_the_limit_stops_is_not_called_solved():
    problems = random_quadratics()
    found = minimise(problems, torch.zeros_like(problems.optima), memory=8, max_evaluations=3)
    assert not bool(found.solved.any())
    assert problems.calls == 3
    assert found.evaluations.tolist() == [3] * 4
    away = found.points - problems.optima
    gradients = (problems.matrices @ away.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.gradient_norms, gradients.norm(dim=1))


def test_a_start_at_the_optimum_costs_one_evaluation():
    problems = random_quadratics()
    found = minimise(problems, problems.optima.clone(), memory=8, max_evaluations=10)
    assert bool(found.solved.all())
    assert problems.calls == 1
