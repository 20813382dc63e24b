"""Parameter groups, AdamW against its equations, clipping of the encoder alone."""

import math

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch.testing import assert_close

from msn.errors import UserError
from msn.method import optim
from msn.method.network import MSN
from msn.method.schedules import ScheduleValues
from msn.weights.timm import timm_twin
from tests.conftest import SMALL_HEAD, SMALL_MODEL

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


@pytest.mark.parametrize("options", [{}, {"position": "rope", "registers": 2, "layer_scale": 0.1}])
def test_a_trunk_apart_decays_from_layer_to_layer_as_timm_s_own_groups_do(options):
    network = MSN(model=SMALL_MODEL | options, head=SMALL_HEAD, num_prototypes=10)
    trunk = network.anchor.trunk
    twin = timm_twin(trunk.state_dict(), trunk.model_config, num_classes=0)
    names = {id(p): name for name, p in twin.named_parameters()}
    wanted = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(twin, layer_decay=0.5)
        for p in group["params"]
    }
    optimizer = optim.build_optimizer(
        network, betas=(0.9, 0.999), eps=1e-8, fused=False, layer_decay=0.5, trunk_apart=True
    )
    optim.set_values(optimizer, VALUES._replace(trunk_lr=0.01))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates.pop(id(p)) / 0.01 for name, p in trunk.named_parameters()}
    assert found == pytest.approx({name: wanted[name] for name in found})
    assert set(found.values()) == {0.25, 0.5, 1.0}  # tokens, two blocks
    assert set(rates.values()) == {0.1}  # head and prototypes
    plain = optim.parameter_groups(network)
    assert [group["use_weight_decay"] for group in plain] == [True, False]


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_layer_decay_out_of_range_is_refused(value):
    with pytest.raises(UserError, match=r"method.layer_decay must be in \(0, 1\], got"):
        optim.check_adamw(betas=(0.9, 0.999), eps=1e-8, layer_decay=value)
