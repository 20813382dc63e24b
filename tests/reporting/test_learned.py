"""Attention and projections in the pictures are those of the network."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import normalize, to_tensor

from msn.commands.report import open_run
from msn.method.network import Encoder
from msn.method.vit import VisionTransformer
from msn.reporting.learned import class_attention, look
from msn.weights import read_weights
from tests.conftest import SMALL_HEAD, SMALL_MODEL
from tests.reporting.runs import make_run


@pytest.mark.parametrize("depth", [1, 2])
def test_attention_is_the_softmax_of_the_class_token_s_products(depth):
    torch.manual_seed(0)
    trunk = VisionTransformer(**{**SMALL_MODEL, "depth": depth}).double().eval()
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        found = class_attention(trunk, pixels)
        block, width = trunk.blocks[-1], 24
        before = (
            trunk.embed(pixels, None) if depth == 1 else trunk.forward_intermediates(pixels, 2)[0]
        )
        for i in range(2):
            for head in range(2):
                rows = slice(12 * head, 12 * head + 12)
                query, key = block.attn.qkv(block.norm1(before[i])).split(width, dim=1)[:2]
                products = key[:, rows] @ query[0, rows] / 12**0.5
                weights = products.exp() / products.exp().sum()
                torch.testing.assert_close(found[i, head].flatten(), weights[1:])


def test_cosines_to_prototypes_are_those_of_the_target_in_eval_mode(tmp_path):
    run = make_run(tmp_path / "run")
    learned = look(run, open_run(run, "run").settings, most=12, device=torch.device("cpu"))
    assert len(learned.images) == len(learned.names) == len(learned.labels) == 12
    weights = read_weights(next((run / "checkpoints").iterdir()))
    head = {**SMALL_HEAD, "hidden_dim": 32, "output_dim": 16}
    encoder = Encoder(weights.model, head).eval()
    encoder.trunk.load_state_dict(weights.trunk)
    encoder.head.load_state_dict(weights.head)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = torch.stack([normalize(to_tensor(image), mean, std) for image in learned.images])
    with torch.no_grad():
        (projections,) = encoder([pixels[None]], [None])
    expected = F.cosine_similarity(projections[0][:, None], weights.prototypes[None], dim=-1)
    torch.testing.assert_close(learned.assignments, expected, rtol=1e-4, atol=1e-5)
