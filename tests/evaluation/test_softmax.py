import pytest
import torch
import torch.nn.functional as F

from msn.evaluation import softmax
from msn.evaluation.softmax import Softmax
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
    monkeypatch.setattr(softmax, "_CACHED_LOGITS", 3 * C)  # three rows at once
    monkeypatch.setattr(softmax, "_SHARES", 4)
    kept = whole.evaluate(weight, whole.scores(weight))
    monkeypatch.setattr(softmax, "_MAX_SCORES", 1)
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
    monkeypatch.setattr(softmax, "_CACHED_LOGITS", 3 * C)
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
