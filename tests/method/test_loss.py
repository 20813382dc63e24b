"""The loss against slow loops written from the equations, and its invariants."""

import math

import pytest
import torch
from torch.testing import assert_close

from msn.errors import UserError
from msn.method.loss import MSNLoss, assign, me_max, power_law_prior, sharpen, sinkhorn


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(**changes):
    settings = {
        "temperature": 0.1,
        "me_max_weight": 1.0,
        "entropy_weight": 0.5,
        "use_sinkhorn": True,
        "sinkhorn_iterations": 3,
    }
    return MSNLoss(**{**settings, **changes})


def loop_softmax(row):
    exponentials = [math.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def loop_assign(vector, prototypes, temperature):
    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    return loop_softmax([cosine(vector, p) / temperature for p in prototypes])


def loop_sinkhorn(rows, iterations):
    num_rows, num_columns = len(rows), len(rows[0])
    total = sum(map(sum, rows))
    rows = [[x / total for x in row] for row in rows]
    for _ in range(iterations):
        sums = [sum(row[k] for row in rows) for k in range(num_columns)]
        rows = [[row[k] / sums[k] / num_columns for k in range(num_columns)] for row in rows]
        rows = [[x / sum(row) / num_rows for x in row] for row in rows]
    return [[x * num_rows for x in row] for row in rows]


def loop_loss(anchor, target, prototypes, loss, sharpen_temperature):
    """Eq. 1 with lists: cross-entropy, KL(mean || prior), entropy."""
    anchor, target, prototypes = anchor.tolist(), target.tolist(), prototypes.tolist()
    targets = []
    for vector in target:
        powers = [p ** (1 / sharpen_temperature) for p in loop_assign(vector, prototypes, 0.1)]
        targets.append([p / sum(powers) for p in powers])
    if loss.use_sinkhorn:
        targets = loop_sinkhorn(targets, loss.sinkhorn_iterations)
    predictions = [[loop_assign(v, prototypes, 0.1) for v in view] for view in anchor]
    flat = [(targets[b], view[b]) for view in predictions for b in range(len(view))]
    cross_entropy = sum(-t * math.log(p) for ts, ps in flat for t, p in zip(ts, ps, strict=True))
    entropy = sum(-p * math.log(p) for _, ps in flat for p in ps)
    count, num_prototypes = len(flat), len(prototypes)
    mean = [sum(ps[k] for _, ps in flat) / count for k in range(num_prototypes)]
    prior = [1 / num_prototypes] * num_prototypes
    if loss.log_prior is not None:
        prior = loss.log_prior.exp().tolist()
    kl = sum(m * math.log(m / q) for m, q in zip(mean, prior, strict=True))
    return cross_entropy / count, kl, entropy / count


@pytest.mark.parametrize("use_sinkhorn", [True, False])
@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_loss_equals_a_loop_over_the_equations(use_sinkhorn, exponent):
    loss = loss_of(use_sinkhorn=use_sinkhorn, prior=power_law_prior(7, exponent))
    anchor, target, prototypes = random(3, 5, 4), random(5, 4, seed=1), random(7, 4, seed=2)
    terms = loss(anchor, target, prototypes, 0.25)
    expected = loop_loss(anchor, target, prototypes, loss, 0.25)
    got = (terms.cross_entropy.item(), terms.me_max.item(), terms.entropy.item())
    assert got == pytest.approx(expected, rel=1e-10)
    total = expected[0] + expected[1] + 0.5 * expected[2]
    assert terms.loss.item() == pytest.approx(total, rel=1e-10)


def test_assignments_ignore_the_scale_of_both_sides():
    x, prototypes = random(4, 6), random(5, 6, seed=1)
    assert_close(assign(3 * x, 7 * prototypes, 0.1), assign(x, prototypes, 0.1))
    assert_close(assign(x, prototypes, 0.1).exp().sum(-1), torch.ones(4, dtype=torch.float64))


def test_sharpening_keeps_the_argmax_and_equals_a_colder_softmax():
    x, prototypes = random(8, 6), random(5, 6, seed=1)
    warm = assign(x, prototypes, 0.1)
    assert_close(sharpen(warm, 0.25), assign(x, prototypes, 0.025))
    assert (sharpen(warm, 0.25).argmax(-1) == warm.argmax(-1)).all()


def test_sinkhorn_rows_are_exact_and_columns_balanced():
    balanced = sinkhorn(random(32, 8), 50).exp()
    assert_close(balanced.sum(1), torch.ones(32, dtype=torch.float64))
    assert_close(balanced.sum(0), torch.full((8,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_sinkhorn_of_permuted_images_is_permuted():
    scores, order = random(12, 5), torch.randperm(12)
    assert_close(sinkhorn(scores[order], 3), sinkhorn(scores, 3)[order])


def test_sinkhorn_survives_scores_that_underflow_in_float32():
    scores = torch.full((4, 3), -200.0)
    scores[:, 0] = 0.0
    assert torch.isfinite(sinkhorn(scores, 3)).all()
    assert_close(sinkhorn(scores, 3).exp().sum(1), torch.ones(4))


def test_me_max_is_zero_only_at_the_prior():
    prior = power_law_prior(6, 0.7)
    assert me_max(prior.log(), prior.log()).item() == pytest.approx(0, abs=1e-15)
    uniform = power_law_prior(6, 0.0)
    assert me_max(uniform.log(), prior.log()) > 1e-3
    collapsed = torch.tensor([0.0] + [-1000.0] * 5, dtype=torch.float64)
    assert me_max(collapsed, uniform.log()).item() == pytest.approx(math.log(6))


def test_power_law_prior_falls_with_its_exponent():
    prior = power_law_prior(4, 2.0)
    assert_close(prior[0] / prior[1], torch.tensor(4.0, dtype=torch.float64))
    assert_close(prior.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_gradient_reaches_prototypes_and_anchors_but_not_targets():
    anchor, target = random(2, 6, 4).requires_grad_(), random(6, 4, seed=1).requires_grad_()
    prototypes = random(5, 4, seed=2).requires_grad_()
    loss_of()(anchor, target, prototypes, 0.25).loss.backward()
    assert prototypes.grad.abs().min() > 0
    assert anchor.grad.abs().sum() > 0
    assert target.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_promoted_and_float64_stays(dtype):
    anchor, target, prototypes = random(2, 6, 4), random(6, 4, seed=1), random(5, 4, seed=2)
    half = [x.to(dtype) for x in (anchor, target, prototypes)]
    terms = loss_of()(*half, 0.25)
    exact = loss_of()(*(x.double() for x in half), 0.25)
    assert terms.loss.dtype is torch.float32
    assert exact.loss.dtype is torch.float64
    assert_close(terms.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)


def test_autocast_does_not_lower_the_loss_precision():
    anchor, target, prototypes = (x.float() for x in (random(2, 6, 4), random(6, 4), random(5, 4)))
    plain = loss_of()(anchor, target, prototypes, 0.25).loss
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_of()(anchor, target, prototypes, 0.25).loss
    assert torch.equal(plain, inside)


def test_loss_stays_finite_where_probabilities_underflow():
    anchor = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    terms = loss_of(temperature=1e-3)(anchor, anchor[0].flip(0), torch.eye(2), 0.25)
    assert torch.isfinite(terms.loss)


@pytest.mark.parametrize(("temperature", "cases"), [(0.01, 360), (0.001, 720)])
def test_mean_predictions_that_underflow_in_float32_cost_no_gradient(temperature, cases):
    """Few images near few of the prototypes: others' mean prediction is below 1e-45."""

    def loss(anchor, target, prototypes):
        return loss_of(temperature=temperature)(anchor, target, prototypes, 0.25).loss

    of_all_cases = torch.func.vmap(torch.func.grad_and_value(loss, argnums=(0, 2)))
    shapes = ((2, 3, 3), (3, 3), (8, 3))
    parts = [random(cases, *shape, seed=i).float() for i, shape in enumerate(shapes)]
    gradients, values = of_all_cases(*parts)
    exact_gradients, exact_values = of_all_cases(*(part.double() for part in parts))
    assert_close(values.double(), exact_values, rtol=1e-4, atol=0)
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        error = (got.double() - wanted).flatten(1).norm(dim=1)
        assert (error <= 1e-4 * wanted.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"me_max_weight": -1.0},
        {"entropy_weight": -0.1},
        {"sinkhorn_iterations": 0},
        {"prior": torch.tensor([0.5, 0.6])},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UserError):
        loss_of(**wrong)
    with pytest.raises(UserError):
        power_law_prior(4, -1.0)
