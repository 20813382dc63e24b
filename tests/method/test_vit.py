"""The trunk against timm, against itself without shortcuts, and its statistics."""

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch.testing import assert_close

from msn.errors import UserError
from msn.method.vit import VisionTransformer, resize_position_embeddings
from tests.conftest import SMALL_MODEL


def small(**changes):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL_MODEL, **changes}).double()


def timm_twin(trunk):
    config = trunk.model_config
    twin = TimmVisionTransformer(**config, num_classes=0).double()
    twin.load_state_dict(trunk.state_dict(), strict=True)
    return twin


@pytest.mark.parametrize("patch_size", [4, 8])
def test_features_equal_timms(patch_size):
    trunk = small(patch_size=patch_size)
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    assert_close(
        trunk.forward_features(images, norm=True), timm_twin(trunk).forward_features(images)
    )


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("vit_small_patch16_224", (224, 16, 384, 12, 6, 4.0)),
        ("vit_base_patch8_224", (224, 8, 768, 12, 12, 4.0)),
        ("vit_large_patch16_224", (224, 16, 1024, 24, 16, 4.0)),
    ],
)
def test_state_dict_is_timms_for_published_sizes(name, numbers):
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    with torch.device("meta"):
        ours = VisionTransformer(**dict(zip(names, numbers, strict=True))).state_dict()
        theirs = timm.create_model(name, num_classes=0).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_class_tokens_of_mixed_sizes_equal_full_blocks_one_size_at_a_time():
    trunk = small()
    large = torch.rand(2, 3, 3, 16, 16, dtype=torch.float64)  # [views, B, ...]
    focal = torch.rand(4, 3, 3, 8, 8, dtype=torch.float64)
    got = trunk([large, focal], [None, None])
    for classes, views in zip(got, (large, focal), strict=True):
        whole = trunk.forward_features(views.flatten(0, 1), norm=True)[:, 0]
        assert_close(classes.flatten(0, 1), whole)


def test_dropped_patches_equal_tokens_removed_after_embedding():
    trunk = small()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    kept = torch.tensor([5, 0, 13, 7])
    tokens = trunk.embed(images, None)
    expected = torch.cat([tokens[:, :1], tokens[:, 1:][:, kept]], dim=1)
    assert_close(trunk.embed(images, kept), expected)
    per_image = torch.stack([kept, kept.flip(0), kept + 1])
    for i, tokens_i in enumerate(trunk.embed(images, per_image)):
        assert_close(tokens_i[1:], tokens[i, 1:][per_image[i]])


def test_dropped_patches_have_no_influence():
    trunk = small()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    kept = torch.arange(1, 16)  # patch 0 is dropped
    changed = images.clone()
    changed[..., :4, :4] += 1
    assert torch.equal(trunk([images], [kept])[0], trunk([changed], [kept])[0])
    assert not torch.equal(trunk([images], [None])[0], trunk([changed], [None])[0])


def test_position_embeddings_are_resized_without_antialias_as_hugging_face_does():
    positions = torch.randn(1, 1 + 14 * 14, 8, dtype=torch.float64)
    ours = resize_position_embeddings(positions, (6, 6))
    image = positions[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    plain = torch.nn.functional.interpolate(image, (6, 6), mode="bicubic", align_corners=False)
    assert_close(ours[:, 1:], plain.permute(0, 2, 3, 1).reshape(1, 36, 8))
    assert torch.equal(ours[:, :1], positions[:, :1])


def test_initialisation_is_the_reference_s():
    torch.manual_seed(0)
    model = {**SMALL_MODEL, "img_size": 64, "embed_dim": 192, "num_heads": 3}
    trunk = VisionTransformer(**model)
    for name, parameter in trunk.named_parameters():
        values = parameter.detach()
        if name == "patch_embed.proj.weight":  # Kaiming normal, fan-in 3 * 4 * 4, gain sqrt(2)
            assert values.std().item() == pytest.approx(math.sqrt(2 / 48), rel=0.03)
        elif name in ("cls_token", "pos_embed") or name.endswith("weight") and values.ndim == 2:
            assert values.std().item() == pytest.approx(
                0.02, rel=0.03 if values.numel() > 999 else 0.2
            )
            assert abs(values.mean().item()) < 0.003
        elif name.endswith("weight"):
            assert (values == 1).all()
        else:
            assert (values == 0).all()


def test_intermediates_end_with_the_last_block():
    trunk = small()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    outputs = trunk.forward_intermediates(images, 2)
    assert len(outputs) == 2
    assert torch.equal(outputs[-1], trunk.forward_features(images, norm=False))
    with pytest.raises(UserError, match=r"\[1, 2\]"):
        trunk.forward_intermediates(images, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"img_size": 15},
        {"num_heads": 5},
        {"depth": 0},
        {"embed_dim": 24.0},
        {"mlp_ratio": 0},
        {"patch_size": "four"},
    ],
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).partition("_")[0]):
        small(**wrong)


def test_a_view_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(UserError, match="10 x 10"):
        small()([torch.rand(1, 3, 10, 10, dtype=torch.float64)], [None])
