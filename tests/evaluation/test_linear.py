"""The SGD probe against a loop from its equations: where it starts, what it sees, where it ends."""

import math

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from msn.evaluation.features import Runtime
from msn.evaluation.linear import SGD, frozen_batches, train_probe
from tests.evaluation.toys import toy_features

RUNTIME = Runtime((torch.device("cpu"),), 0, shared=False)


def test_the_probe_starts_at_zero_on_plain_rows_and_is_the_last_step_s():
    """No affine norm between rows and layer, and no epoch is picked by its test figures."""
    probe = SGD(
        epochs=3, batch_size=30, lr=5.0, momentum=0.9, weight_decay=0.0, augment=False, seed=0
    )
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
