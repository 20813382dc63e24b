"""Anchor, target, head and prototypes: EMA, chunks, initialisation."""

import math

import pytest
import torch
from torch.testing import assert_close

from msn.errors import UserError
from msn.method.loss import MSNLoss
from msn.method.network import MSN, ProjectionHead, lerp_unless
from tests.conftest import SMALL_HEAD, SMALL_MODEL

LOSS = MSNLoss(
    temperature=0.1, me_max_weight=1.0, entropy_weight=0.0, use_sinkhorn=True, sinkhorn_iterations=3
)


def views(batch=6, focal=3):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, 3, 16, 16), (1, batch, 3, 16, 16), (focal, batch, 3, 8, 8)]
    return [torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def step(network, chunk_size):
    kept = torch.stack([torch.randperm(16)[:12] for _ in range(6)]).unsqueeze(0)
    out = network(*views(), kept, chunk_size)
    terms = LOSS(out.anchor, out.target, network.prototypes, 0.25)
    terms.loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return terms.loss.detach(), gradients


@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_chunks_change_neither_loss_nor_gradients(small_network, chunk_size):
    torch.manual_seed(2)
    loss, gradients = step(small_network, None)
    small_network.zero_grad()
    torch.manual_seed(2)
    chunked_loss, chunked = step(small_network, chunk_size)
    assert_close(chunked_loss, loss, rtol=1e-12, atol=1e-12)
    assert chunked.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(chunked[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chunk_size", "passes"), [(None, 1), (100, 2), (6, 2), (3, 4), (2, 6)])
def test_every_chunk_runs_again_in_the_backward_pass(small_network, chunk_size, passes):
    calls = []
    small_network.anchor.trunk.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    step(small_network, chunk_size)
    assert len(calls) == passes


def test_target_starts_as_the_anchor_and_gets_no_gradient(small_network):
    for ours, theirs in zip(
        small_network.target.parameters(), small_network.anchor.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    _, gradients = step(small_network, None)
    assert {name.split(".")[0] for name in gradients} == {"anchor", "prototypes"}
    assert len(gradients) == len(list(small_network.anchor.parameters())) + 1


def test_ema_follows_its_closed_form_and_leaves_buffers(small_network):
    start = [p.clone() for p in small_network.target.parameters()]
    buffers = [b.clone() for b in small_network.target.buffers()]
    with torch.no_grad():
        for parameter in small_network.anchor.parameters():
            parameter.add_(1.0)
    for buffer in small_network.anchor.buffers():
        buffer.add_(1)
    for _ in range(5):
        small_network.update_target(0.9)
    for before, after in zip(start, small_network.target.parameters(), strict=True):
        assert_close(after, before + (1 - 0.9**5))
    for before, after in zip(buffers, small_network.target.buffers(), strict=True):
        assert torch.equal(before, after)


def test_views_keep_their_order_and_axis(small_network):
    target, rand, focal = views()
    out = small_network(target, rand, focal, None)
    assert out.anchor.shape == (4, 6, 16)
    assert out.target.shape == (6, 16)
    swapped = small_network(target, rand, focal.flip(0), None)
    assert_close(swapped.anchor[1:], out.anchor[1:].flip(0))


@pytest.mark.parametrize("absent", ["rand", "focal"])
def test_a_kind_of_view_may_be_absent(small_network, absent):
    target, rand, focal = views()
    if absent == "rand":
        rand = rand[:0]
    else:
        focal = focal[:0]
    expected = 3 if absent == "rand" else 1
    assert small_network(target, rand, focal, None).anchor.shape[0] == expected


def test_prototypes_and_head_start_as_in_the_reference():
    torch.manual_seed(0)
    network = MSN(model=SMALL_MODEL, head={**SMALL_HEAD, "hidden_dim": 256}, num_prototypes=500)
    bound = 1 / math.sqrt(16)
    assert network.prototypes.abs().max().item() <= bound
    assert network.prototypes.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    head = network.anchor.head
    assert head.fc2.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert (head.fc1.bias == 0).all()
    assert (head.bn1.weight == 1).all()


def test_head_without_batch_norm_treats_rows_alone():
    head = ProjectionHead(8, hidden_dim=16, output_dim=4, use_batch_norm=False).double()
    rows = torch.randn(5, 8, dtype=torch.float64)
    assert_close(head(rows)[:2], head(rows[:2]))
    assert not any("bn" in name for name in head.state_dict())


def test_wrong_counts_are_refused():
    with pytest.raises(UserError, match="num_prototypes"):
        MSN(model=SMALL_MODEL, head=SMALL_HEAD, num_prototypes=1)
    with pytest.raises(UserError, match="hidden_dim"):
        MSN(model=SMALL_MODEL, head={**SMALL_HEAD, "hidden_dim": 0}, num_prototypes=4)


def test_where_a_step_was_not_taken_the_target_stays():
    def moved(skip):
        start = [torch.ones(3), torch.zeros(2)]
        lerp_unless(torch.tensor(float(skip)), start, [torch.zeros(3), torch.ones(2)], 0.25)
        return start

    assert_close(moved(0), [torch.full((3,), 0.75), torch.full((2,), 0.25)])
    assert_close(moved(1), [torch.ones(3), torch.zeros(2)], rtol=0, atol=0)


def test_on_the_cpu_the_same_is_decided_by_the_host(small_network):
    def after(skip):
        for parameter in small_network.anchor.parameters():
            parameter.data.add_(1.0)
        before = [p.clone() for p in small_network.target.parameters()]
        small_network.update_target(0.9, torch.tensor(skip))
        return list(zip(before, small_network.target.parameters(), strict=True))

    assert all(torch.equal(*pair) for pair in after(1.0))
    assert not any(torch.equal(*pair) for pair in after(0.0))
