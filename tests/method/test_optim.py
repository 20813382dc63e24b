"""Parameter groups, AdamW against its equations, clipping of the encoder alone."""

import math

import pytest
import torch
from torch.testing import assert_close

from msn.errors import UserError
from msn.method import optim
from msn.method.schedules import ScheduleValues

VALUES = ScheduleValues(lr=0.1, weight_decay=0.5, momentum=0.9, sharpen_temperature=0.25)


def fill_gradients(network):
    generator = torch.Generator().manual_seed(0)
    for parameter in [*network.anchor.parameters(), network.prototypes]:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_every_trained_parameter_is_in_one_group_and_the_target_in_none(small_network):
    groups = optim.parameter_groups(small_network)
    members = [id(p) for group in groups for p in group["params"]]
    trained = [*small_network.anchor.parameters(), small_network.prototypes]
    assert sorted(members) == sorted(id(p) for p in trained)


def test_decayed_are_matrices_and_tokens_but_not_prototypes(small_network):
    decayed = {id(p) for p in optim.parameter_groups(small_network)[0]["params"]}
    for name, parameter in small_network.anchor.named_parameters():
        free = parameter.ndim == 1 or "bias" in name or "bn" in name
        assert (id(parameter) in decayed) != free, name
    assert id(small_network.prototypes) not in decayed
    assert id(small_network.anchor.trunk.cls_token) in decayed


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_adamw_s(small_network, fused):
    optimizer = optim.build_optimizer(small_network, betas=(0.9, 0.999), eps=1e-8, fused=fused)
    fill_gradients(small_network)
    before = {n: p.detach().clone() for n, p in small_network.named_parameters()}
    optim.set_values(optimizer, VALUES)
    optimizer.step()
    for name, parameter in small_network.named_parameters():
        if parameter.grad is None:
            assert torch.equal(parameter, before[name])
            continue
        decay = 0.5 if parameter.ndim > 1 and name != "prototypes" else 0.0
        # first step: both moments equal the gradient and its square after bias correction
        move = parameter.grad / (parameter.grad.abs() + 1e-8)
        assert_close(parameter, before[name] * (1 - 0.1 * decay) - 0.1 * move)


def test_only_the_encoder_is_clipped(small_network):
    fill_gradients(small_network)
    prototypes = small_network.prototypes.grad.clone()
    total = torch.cat([p.grad.flatten() for p in small_network.anchor.parameters()]).norm()
    assert total > 3
    norm = optim.clip_encoder(small_network.anchor, 3.0)
    clipped = torch.cat([p.grad.flatten() for p in small_network.anchor.parameters()]).norm()
    assert_close(norm, total)
    assert clipped.item() == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(small_network.prototypes.grad, prototypes)


def test_without_a_limit_the_norm_is_measured_alone(small_network):
    fill_gradients(small_network)
    before = [p.grad.clone() for p in small_network.anchor.parameters()]
    optim.clip_encoder(small_network.anchor, None)
    for gradient, parameter in zip(before, small_network.anchor.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_impossible_adamw_numbers_are_refused(small_network):
    with pytest.raises(UserError, match="betas"):
        optim.build_optimizer(small_network, betas=(0.9, 1.0), eps=1e-8, fused=False)
    with pytest.raises(UserError, match="eps"):
        optim.build_optimizer(small_network, betas=(0.9, 0.999), eps=0.0, fused=False)


def test_running_statistics_come_back_where_a_step_was_skipped_even_from_nan(small_network):
    def after(skip):
        guard = optim.BufferGuard(small_network)
        before = {name: buffer.clone() for name, buffer in small_network.named_buffers()}
        for buffer in small_network.buffers():
            buffer.fill_(math.nan if buffer.is_floating_point() else 7)
        guard.restore_if(torch.tensor(float(skip)))
        return before, dict(small_network.named_buffers())

    before, now = after(skip=1)
    assert {buffer.dtype for buffer in now.values()} == {torch.float64, torch.int64}
    assert_close(now, before, rtol=0, atol=0)
    _, now = after(skip=0)
    assert all(bool((x.isnan() | (x == 7)).all()) for x in now.values())
