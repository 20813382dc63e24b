"""Small trunks whose every parameter matters, and their exports."""

import pytest
import torch

from msn.method.vit import VisionTransformer
from msn.weights.weights import Weights

MODELS = {
    "s16": (224, 16, 384, 6),
    "s16_96px": (96, 16, 384, 6),
    "patch4": (16, 4, 32, 2),
    "patch7": (28, 7, 64, 1),
}


def make_weights(name="patch4", depth=2, **more):
    """Norms and biases are moved off 1 and 0, where a swap would go unnoticed."""
    size, patch, width, heads = MODELS[name]
    model = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": 4,
    }
    torch.manual_seed(1)
    trunk = VisionTransformer(**model)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    meta = {"licence": "Apache-2.0", "epoch": 3, "data": {"source": "digits"}}
    return Weights(trunk=trunk.state_dict(), model=model, source="test", meta=meta, **more)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def weights():
    return make_weights()
