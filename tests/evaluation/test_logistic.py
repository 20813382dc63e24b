import logging
import time

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from msn.errors import UserError
from msn.evaluation import logistic, softmax
from msn.evaluation.logistic import centre_and_normalise, fit_logistic, principal_coordinates
from tests.evaluation.toys import unit_rows


def made_up(count, width, classes, *, seed=0, dtype=torch.float64):
    rows = unit_rows(count, width, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1000)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[:classes] = torch.arange(classes)
    return rows, labels


def solve(rows, labels, *, classes, lambdas, tolerance=1e-14, **settings):
    return fit_logistic(
        rows.unsqueeze(0) if rows.ndim == 2 else rows,
        labels.unsqueeze(0) if labels.ndim == 1 else labels,
        num_classes=classes,
        lambdas=lambdas,
        tolerance=tolerance,
        max_evaluations=settings.pop("max_evaluations", 3000),
        **settings,
    )


def oracle(rows, labels, strength):
    """scikit-learn in float64, run until it cannot improve."""
    model = LogisticRegression(
        C=1 / (strength * len(rows)),
        fit_intercept=False,
        tol=1e-14,
        max_iter=100_000,
        solver="newton-cg",
    )
    return torch.from_numpy(model.fit(rows.numpy(), labels.numpy()).coef_)


def objective(rows, labels, weight, strength):
    return F.cross_entropy(rows @ weight.T, labels) + strength / 2 * weight.square().sum()


@pytest.mark.parametrize(
    ("count", "width", "classes", "lambd"),
    [(60, 10, 4, 0.0025), (60, 10, 4, 2.5), (20, 50, 10, 0.0025), (10, 96, 10, 0.0025)],
)
def test_coefficients_equal_a_float64_oracle(count, width, classes, lambd):
    rows, labels = made_up(count, width, classes)
    fit = solve(rows, labels, classes=classes, lambdas=[lambd / count])
    assert bool(fit.converged.all())
    expected = oracle(rows, labels, lambd / count)
    torch.testing.assert_close(fit.weight[0, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_turn", [False, True])
def test_reported_objective_and_gradient_are_those_of_the_weights(in_turn, monkeypatch):
    if in_turn:
        monkeypatch.setattr(logistic, "_SIDE_BY_SIDE", 0)
    rows, labels = made_up(40, 12, 5)
    lambdas = [1e-2, 1e-4, 1e-3]
    fit = solve(rows, labels, classes=5, lambdas=lambdas, tolerance=1e-5)
    for i, strength in enumerate(lambdas):
        weight = fit.weight[0, i].clone().requires_grad_()
        value = objective(rows, labels, weight, strength)
        (gradient,) = torch.autograd.grad(value, weight)
        torch.testing.assert_close(fit.objective[0, i], value.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(fit.gradient_norm[0, i], gradient.norm(), rtol=1e-4, atol=0)


def test_certified_gap_holds_against_the_true_optimum():
    rows, labels = made_up(80, 10, 6)
    strength = 1e-4
    exact = solve(rows, labels, classes=6, lambdas=[strength], tolerance=1e-15).objective.item()
    for tolerance in (1e-2, 1e-4, 1e-6):
        fit = solve(rows, labels, classes=6, lambdas=[strength], tolerance=tolerance)
        gap = fit.objective.item() - exact
        assert 0 <= gap <= tolerance * fit.objective.item()
        assert gap <= fit.gradient_norm.item() ** 2 / (2 * strength)


def test_a_device_holds_the_logits_of_one_share_at_a_time(monkeypatch):
    """Shares are as large as memory allows; threads would each hold one."""
    monkeypatch.setattr(softmax, "in_threads", lambda *_: pytest.fail("several at a time"))
    rows, labels = torch.zeros(2, 64, 4, device="meta"), torch.zeros(2, 64, device="meta").long()
    problem = softmax.Softmax.of(
        rows, labels, torch.zeros(2, device="meta"), num_classes=5, tolerance=0.0
    )
    assert problem.scores(torch.zeros(2, 20, device="meta")).shape == (2, 64, 5)


def test_many_sets_and_lambdas_in_one_go_equal_one_at_a_time():
    rows = torch.stack([unit_rows(30, 8, seed=s) for s in range(3)])
    labels = torch.stack([made_up(30, 8, 4, seed=s)[1] for s in range(3)])
    lambdas = [1e-4, 1e-2]
    together = solve(rows, labels, classes=4, lambdas=lambdas)
    assert together.weight.shape == (3, 2, 4, 8)
    for s in range(3):
        for i, strength in enumerate(lambdas):
            alone = solve(rows[s], labels[s], classes=4, lambdas=[strength])
            torch.testing.assert_close(
                together.weight[s, i], alone.weight[0, 0], rtol=1e-5, atol=1e-5
            )


def test_large_problems_in_turn_reach_the_same_optimum(monkeypatch):
    rows, labels = made_up(50, 12, 4)
    lambdas = [1e-4, 1e-2, 1e-3]
    expected = solve(rows, labels, classes=4, lambdas=lambdas)
    monkeypatch.setattr(logistic, "_SIDE_BY_SIDE", 0)
    found = solve(rows, labels, classes=4, lambdas=lambdas)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-5, atol=1e-5)


def test_where_float32_cannot_certify_float64_goes_on(monkeypatch):
    rows, labels = made_up(200, 20, 5, dtype=torch.float32)
    settings = {"classes": 5, "lambdas": [1e-6], "tolerance": 1e-13}
    assert not bool(solve(rows, labels, dtype=torch.float32, **settings).converged)
    monkeypatch.setattr(logistic, "_SMALL", 0)
    monkeypatch.setattr(logistic, "_SIDE_BY_SIDE", 0)
    fit = solve(rows, labels, **settings)
    assert bool(fit.converged)
    assert fit.weight.dtype == torch.float32


def test_a_class_without_rows_gets_the_weights_of_the_optimum():
    rows, labels = made_up(30, 6, 3)
    fit = solve(rows, labels, classes=4, lambdas=[1e-2])
    weight = fit.weight[0, 0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(rows, labels, weight, 1e-2), weight)
    assert float(gradient.norm()) < 1e-7
    assert float(weight[3].detach().norm()) > 0.1


def test_what_does_not_converge_is_said(caplog):
    rows, labels = made_up(40, 12, 5)
    with caplog.at_level(logging.WARNING):
        fit = solve(rows, labels, classes=5, lambdas=[1e-6], max_evaluations=4)
    assert not bool(fit.converged)
    assert "1 of 1 fits did not converge (4 evaluations of at most 4" in caplog.text


def test_two_runs_give_the_same_bits():
    rows, labels = made_up(300, 20, 5, dtype=torch.float32)
    first, second = (
        solve(rows, labels, classes=5, lambdas=[1e-4], tolerance=1e-6).weight for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(("count", "width"), [(6, 20), (20, 6)])
def test_principal_coordinates_are_uncorrelated_and_map_back(count, width):
    rows = torch.stack([unit_rows(count, width, seed=s) for s in range(2)])
    coordinates, back = principal_coordinates(rows)
    assert coordinates.shape == (2, count, min(count, width))
    torch.testing.assert_close(coordinates @ back, rows, rtol=0, atol=1e-7)
    moments = coordinates.mT @ coordinates
    off_diagonal = moments - torch.diag_embed(moments.diagonal(dim1=1, dim2=2))
    assert float(off_diagonal.abs().max()) < 1e-10


def test_equal_rows_do_not_break_the_span():
    rows, labels = made_up(8, 30, 4)
    rows, labels = torch.cat([rows, rows]), torch.cat([labels, labels])
    fit = solve(rows, labels, classes=4, lambdas=[1e-3])
    expected = oracle(rows, labels, 1e-3)
    torch.testing.assert_close(fit.weight[0, 0], expected, rtol=1e-5, atol=1e-5)


def test_rows_are_centred_and_have_length_one():
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 9 + 3
    found = centre_and_normalise(rows)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    # The same up to scale as LayerNorm without affine (protocol of the paper).
    torch.testing.assert_close(found * 7**0.5, F.layer_norm(rows, (7,)), rtol=1e-4, atol=1e-4)


def test_tf32_of_the_trainer_does_not_reach_the_solver_and_is_left_as_it_was(monkeypatch):
    seen = []
    original = logistic.minimise
    monkeypatch.setattr(
        logistic,
        "minimise",
        lambda *a, **k: seen.append(torch.get_float32_matmul_precision()) or original(*a, **k),
    )
    rows, labels = made_up(10, 4, 2)
    torch.set_float32_matmul_precision("high")
    try:
        solve(rows, labels, classes=2, lambdas=[1e-2])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 1}, "at least 2 classes"),
        ({"lambdas": [0.0]}, "lambda must be > 0"),
        ({"lambdas": []}, "lambda must be > 0"),
        ({"tolerance": 0.0}, "tolerance must be > 0"),
        ({"classes": 3}, r"labels must be in \[0, 3\)"),
    ],
)
def test_bad_settings_are_refused(change, message):
    rows, labels = made_up(10, 4, 5)
    with pytest.raises(UserError, match=message):
        solve(rows, labels, **{"classes": 5, "lambdas": [1e-2], **change})


def test_rows_that_are_not_finite_are_refused():
    rows, labels = made_up(10, 4, 2)
    rows[3, 1] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        solve(rows, labels, classes=2, lambdas=[1e-2])


@pytest.mark.slow
def test_a_thousand_classes_are_solved_in_seconds():
    # The reference's solver needs 132 s on two cores for this; 8 s are promised there.
    count = 12_811
    rows = F.normalize(torch.randn(count, 384, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(count) % 1000
    begin = time.perf_counter()
    fit = solve(rows, labels, classes=1000, lambdas=[0.075 / count], tolerance=1e-6)
    seconds = time.perf_counter() - begin
    assert bool(fit.converged)
    assert seconds < 30  # machines differ, and share their cores
    exact = objective(rows.double(), labels, fit.weight[0, 0].double(), 0.075 / count)
    torch.testing.assert_close(fit.objective[0, 0], exact, rtol=2e-7, atol=0)
