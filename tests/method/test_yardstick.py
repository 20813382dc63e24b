"""The plain step of benchmarks/yardstick.py is the same method as the product's fast one."""

import importlib.util

import pytest
import torch
from torch.testing import assert_close

from msn.method import optim
from msn.method.loss import MSNLoss
from msn.method.schedules import ScheduleValues
from tests.conftest import ROOT, SMALL_HEAD, SMALL_MODEL

VALUES = ScheduleValues(lr=1e-2, weight_decay=0.1, momentum=0.9, sharpen_temperature=0.25)


def load_yardstick():
    path = ROOT / "benchmarks" / "yardstick.py"
    spec = importlib.util.spec_from_file_location("yardstick", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_step(network, loss, optimizer, views, kept):
    out = network(*views, kept)
    terms = loss(out.anchor, out.target, network.prototypes, VALUES.sharpen_temperature)
    optimizer.zero_grad()
    terms.loss.backward()
    optim.clip_encoder(network.anchor, 0.5)
    optim.set_values(optimizer, VALUES)
    optimizer.step()
    network.update_target(VALUES.momentum)
    return terms.loss.detach()


@pytest.mark.parametrize("use_sinkhorn", [True, False])
def test_three_steps_of_both_agree_in_every_weight(small_network, use_sinkhorn):
    yardstick = load_yardstick()
    plain = yardstick.Yardstick(model=SMALL_MODEL, head=SMALL_HEAD, num_prototypes=10).double()
    plain.load_state_dict(small_network.state_dict())
    numbers = yardstick.Numbers(
        lr=VALUES.lr,
        weight_decay=VALUES.weight_decay,
        momentum=VALUES.momentum,
        temperature=0.1,
        sharpen_temperature=VALUES.sharpen_temperature,
        sinkhorn_iterations=3 if use_sinkhorn else 0,
        me_max_weight=1.0,
        clip_grad_norm=0.5,
    )
    loss = MSNLoss(
        temperature=0.1,
        me_max_weight=1.0,
        entropy_weight=0.0,
        use_sinkhorn=use_sinkhorn,
        sinkhorn_iterations=3,
    )
    ours = optim.build_optimizer(small_network, betas=(0.9, 0.999), eps=1e-8, fused=True)
    theirs = plain.build_optimizer()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        shapes = [(6, 3, 16, 16), (1, 6, 3, 16, 16), (3, 6, 3, 8, 8)]
        views = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
        kept = torch.randperm(16, generator=generator)[:12]
        expected = plain.step(theirs, tuple(views), kept, numbers)
        assert_close(our_step(small_network, loss, ours, views, kept), expected)
    for name, value in plain.state_dict().items():
        # Parameters without a true gradient move by rounding noise, which Adam amplifies.
        got = small_network.state_dict()[name]
        assert_close(got, value, rtol=1e-7, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
