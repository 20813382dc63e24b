"""Counted operations against torch's own counter on the plain network."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from msn.method.network import ProjectionHead
from msn.method.vit import VisionTransformer
from msn.training.cost import flops_per_image, trunk_flops
from tests.conftest import SMALL_HEAD, SMALL_MODEL


def counted(run):
    # Attention as two plain products: not every torch's counter knows the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


MODERN = {"position": "rope", "mlp": "swiglu", "layer_scale": 0.1, "registers": 2}


@pytest.mark.parametrize("options", [{}, MODERN])
@pytest.mark.parametrize("kept", [None, 12])
def test_the_trunk_s_count_is_torch_s_of_full_blocks(kept, options):
    model = SMALL_MODEL | options
    trunk = VisionTransformer(**model)
    images = torch.rand(1, 3, 16, 16)
    keep = None if kept is None else torch.arange(kept)

    def full_blocks():
        tokens, turns = trunk.embed(images, keep), trunk.turns([images], [keep])
        for block in trunk.blocks:
            tokens = block(tokens.flatten(0, 1), ((1, tokens.shape[1]),), turns).view_as(tokens)

    assert counted(full_blocks) == trunk_flops(model, kept or 16)


def test_a_step_is_one_target_and_three_times_each_anchor():
    counts = flops_per_image(
        model=SMALL_MODEL,
        head=SMALL_HEAD,
        num_prototypes=10,
        patch_drop=0.25,
        rand_views=2,
        focal_views=5,
        rand_size=16,
        focal_size=8,
    )
    head = ProjectionHead(24, **SMALL_HEAD)
    shared = counted(lambda: head(torch.rand(2, 24)) @ torch.rand(16, 10)) / 2  # two rows
    assert counts.target == trunk_flops(SMALL_MODEL, 16) + shared
    assert counts.rand == 3 * 2 * (trunk_flops(SMALL_MODEL, 12) + shared)
    assert counts.focal == 3 * 5 * (trunk_flops(SMALL_MODEL, 4) + shared)
    assert counts.total == sum(counts)


def test_the_paper_s_small_model_costs_what_its_formula_says():
    model = {"patch_size": 16, "embed_dim": 384, "depth": 12, "mlp_ratio": 4.0}
    counts = flops_per_image(
        model=model,
        head={"hidden_dim": 2048, "output_dim": 256},
        num_prototypes=1024,
        patch_drop=0.15,
        rand_views=1,
        focal_views=10,
        rand_size=224,
        focal_size=96,
    )
    assert counts.total == pytest.approx(81.3e9, rel=0.005)
