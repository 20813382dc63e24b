import torch

from msn.evaluation.solver import minimise


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
