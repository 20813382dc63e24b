"""The block that makes class tokens alone against the full block."""

import pytest
import torch
from torch.testing import assert_close

from msn.method.block import Block
from msn.method.vit import VisionTransformer
from tests.conftest import SMALL_MODEL

GROUPS = ((3, 9), (5, 5), (2, 1))  # (images, tokens per image)


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    trunk = VisionTransformer(**SMALL_MODEL).double()
    for parameter in trunk.parameters():  # biases and norms that are not 0 and 1
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return trunk.blocks


def outcome(run, block):
    """Output, gradient of the tokens and of every parameter, for one random cotangent."""
    generator = torch.Generator().manual_seed(1)
    total = sum(batch * length for batch, length in GROUPS)
    tokens = torch.randn(total, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    out = run(tokens, GROUPS)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    names = [name for name, _ in block.named_parameters()]
    gradients = torch.autograd.grad(out, [tokens, *block.parameters()], cotangent)
    return {"out": out, **dict(zip(["tokens", *names], gradients, strict=True))}


def test_class_tokens_alone_equal_those_of_the_full_block_with_every_gradient(blocks):
    block = blocks[0]

    def full(tokens, groups):
        parts = block(tokens, groups).split([batch * length for batch, length in groups])
        return torch.cat([p.view(*g, -1)[:, 0] for p, g in zip(parts, groups, strict=True)])

    alone, plain = outcome(block.class_tokens, block), outcome(full, block)
    for name, value in plain.items():
        assert_close(alone[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: n + m)


def test_under_bf16_class_tokens_alone_are_no_worse_than_those_of_the_full_block():
    torch.manual_seed(0)
    block = Block(64, 4, 4, qkv_bias=True).requires_grad_(False)
    block.attn.qkv.weight.normal_(std=0.6)  # large scores, which bf16 would round visibly
    block.attn.qkv.bias.normal_(std=3)
    tokens, groups = torch.randn(400, 64), ((8, 50),)
    exact = block.double()(tokens.double(), groups).view(8, 50, 64)[:, 0]
    block.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = block(tokens, groups).view(8, 50, 64)[:, 0]
        alone = block.class_tokens(tokens, groups)
    assert (alone - exact).abs().mean() < (full - exact).abs().mean()
