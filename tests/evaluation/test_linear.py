"""The probes against loops from their equations: first weights, rows, last weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from msn.commands.entry import compose
from msn.errors import UserError
from msn.evaluation.features import Runtime
from msn.evaluation.linear import SGD, frozen_batches, random_crops, train_probe
from tests.evaluation.toys import toy_backbone, toy_features

RUNTIME = Runtime((torch.device("cpu"),), 0, shared=False)
PLAIN = {
    **{"momentum": 0.9, "weight_decay": 0.0, "warmup_epochs": 0, "lars": False},
    **{"batch_norm": False, "augment": False, "interpolation": "bilinear", "seed": 0},
}


def sgd(**changes):
    return SGD(**{**PLAIN, **changes})


def test_the_probe_starts_at_zero_on_plain_rows_and_is_the_last_step_s():
    """No affine norm between rows and layer, and no epoch is picked by its test figures."""
    probe = sgd(epochs=3, batch_size=30, lr=5.0)
    train = toy_features(10, 3, 6, spread=1.0, seed=0)
    batches = frozen_batches(train, probe, RUNTIME)
    got = train_probe(batches, probe, count=30, classes=3, runtime=RUNTIME)
    rows = train.features - train.features.mean(dim=1, keepdim=True)
    rows = torch.cat([rows / rows.norm(dim=1, keepdim=True), torch.ones(30, 1)], dim=1)
    wanted, velocity = torch.zeros(3, 7), torch.zeros(3, 7)
    for epoch in range(3):
        error = torch.softmax(rows @ wanted.T, dim=1) - F.one_hot(train.labels, 3)
        gradient = error.T @ rows / 30
        velocity = gradient if epoch == 0 else 0.9 * velocity + gradient
        rate = 5.0 * 0.5 * (1 + math.cos(math.pi * epoch / 3))
        wanted = wanted - rate * (gradient + 0.9 * velocity)
    assert_close(torch.cat([got[0], got[1][:, None]], dim=1), wanted, rtol=1e-4, atol=1e-5)


def test_mae_s_probe_is_batch_norm_without_affine_and_lars_as_in_a_plain_loop():
    """Two batches per epoch, warm-up; in float64; what comes out is for features as they are."""
    mae = {"epochs": 4, "batch_size": 15, "lr": 6.4, "warmup_epochs": 2}
    probe = sgd(**mae, lars=True, batch_norm=True)
    train = toy_features(10, 3, 6, spread=1.0, seed=0)
    scales = torch.tensor([1e-3, 1.0, 5.0, 5.0, 5.0, 5.0], dtype=torch.float64)  # eps tells
    train = train._replace(features=train.features.double() * scales + 3)
    torch.set_default_dtype(torch.float64)
    try:
        batches = list(frozen_batches(train, probe, RUNTIME))
        got = train_probe(iter(batches), probe, count=30, classes=3, runtime=RUNTIME)
        head = torch.nn.Linear(6, 3)
        probe.optimiser(head)  # draws the first weights
        norm = torch.nn.BatchNorm1d(6, affine=False, eps=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert 0.004 < head.weight.std() < 0.02
    assert len(batches) == 8
    weight, bias = head.weight.detach().clone(), torch.zeros(3, dtype=torch.float64)
    speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step, (rows, labels, _) in enumerate(batches):
        seen, epoch = norm(rows), step / 2
        rate = 6.4 * (epoch / 2 if epoch < 2 else 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 2)))
        error = (torch.softmax(seen @ weight.T + bias, dim=1) - F.one_hot(labels, 3)) / 15
        gradient = error.T @ seen
        trust = 0.001 * weight.norm() / gradient.norm()
        speeds = [0.9 * speeds[0] + trust * gradient, 0.9 * speeds[1] + error.sum(dim=0)]
        weight, bias = weight - rate * speeds[0], bias - rate * speeds[1]
    norm.eval()
    wanted = norm(train.features) @ weight.T + bias
    # timm adds 1e-8 to the gradient's norm.
    assert_close(train.features @ got[0].T + got[1], wanted, rtol=1e-6, atol=1e-6)
    assert_close(probe.prepared(train.features), train.features)


def test_linear_mae_is_the_paper_s_recipe():
    composed = compose("eval_lowshot", ["protocol=linear_mae"]).protocol
    assert composed.features.feature == "class_token_norm"
    assert composed.logistic is None
    probe = SGD(**composed.sgd)
    assert probe.lr == 0.1 * probe.batch_size / 256
    assert (probe.epochs, probe.warmup_epochs, probe.weight_decay) == (90, 10, 0)
    assert (probe.lars, probe.batch_norm) == (True, True)
    crop = random_crops(toy_backbone(), probe.interpolation).transforms[0]
    assert crop.interpolation.value == "bicubic"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warmup_epochs": 3}, "warmup_epochs=3: must be below the 3 epochs"),
        ({"interpolation": "best"}, "interpolation must be bilinear or bicubic, got best"),
    ],
)
def test_wrong_settings_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        sgd(**{"epochs": 3, "batch_size": 30, "lr": 5.0, **changes})
