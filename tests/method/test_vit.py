"""The trunk against timm, against itself without shortcuts, and its statistics."""

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch.testing import assert_close

from msn.errors import UserError
from msn.method.network import MSN
from msn.method.positions import resize_by_products, resize_position_embeddings
from msn.method.vit import VisionTransformer
from tests.conftest import SMALL_HEAD, SMALL_MODEL
from tests.method.families import FAMILIES, twins


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


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(6, 6), (3, 9), (20, 16)])
def test_products_resize_as_the_bicubic_kernel_does(grid, antialias):
    image = torch.rand(1, 5, 14, 14, dtype=torch.float64)
    wanted = torch.nn.functional.interpolate(image, size=grid, mode="bicubic", antialias=antialias)
    assert_close(resize_by_products(image, grid, antialias), wanted, rtol=1e-12, atol=1e-12)


def test_mixed_precision_does_not_round_the_class_token():
    trunk = VisionTransformer(**SMALL_MODEL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = trunk.embed(torch.rand(2, 3, 16, 16), None)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens[1, 0], (trunk.cls_token + trunk.pos_embed[:, :1])[0, 0])


@torch.no_grad()
def test_a_stream_in_half_precision_is_near_and_without_autocast_the_same():
    torch.manual_seed(0)
    trunk = VisionTransformer(**SMALL_MODEL)
    images, seen = torch.rand(2, 3, 16, 16), []
    trunk.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    exact = trunk([images], [None])[0]
    trunk.half_stream = True
    assert torch.equal(trunk([images], [None])[0], exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = trunk([images], [None])[0]
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert 0 < (rounded - exact).abs().max() < 3e-2 * exact.abs().max()


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


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_family_computes_what_its_own_model_of_timm_does_at_three_sizes(name):
    theirs, ours = twins(name)
    for patches in (4, 3, 7):
        images = torch.randn(2, 3, patches * ours.patch_size, patches * ours.patch_size)
        if patches != 4 and ours.pos_embed is not None and ours.class_position:
            continue  # timm antialiases positions there; transformers' model is the oracle
        features = ours.forward_features(images, norm=True)
        assert_close(features, theirs.forward_features(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_kept_patches_are_timm_s_blocks_over_those_tokens_at_their_own_places(name):
    theirs, ours = twins(name)
    theirs, ours = theirs.double(), ours.double()
    images = torch.randn(2, 3, ours.img_size, ours.img_size, dtype=torch.float64)
    kept = torch.tensor([[5, 0, 13], [2, 15, 7]])
    first = ours.num_prefix_tokens
    tokens = theirs._pos_embed(theirs.patch_embed(images))
    tokens, turns = tokens if isinstance(tokens, tuple) else (tokens, None)
    got = ours([images[None], images[None]], [kept[None], kept[0]])
    for choice, classes in zip((kept, kept[:1].expand(2, -1)), got, strict=True):
        for i, patches in enumerate(choice):
            part = torch.cat([tokens[i : i + 1, :first], tokens[i : i + 1, first + patches]], 1)
            for block in theirs.blocks:
                part = block(part) if turns is None else block(part, rope=turns[patches])
            # timm's periods are float32.
            assert_close(classes[0, i], theirs.norm(part)[0, 0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_of_each_family_packed_sizes_and_class_tokens_alone_equal_full_blocks(name):
    ours = twins(name)[1].double()
    size = ours.patch_size
    views = [torch.randn(2, 3, n * size, n * size, dtype=torch.float64) for n in (4, 3, 2)]
    for classes, view in zip(ours(views, [None] * 3), views, strict=True):
        assert_close(classes, ours.forward_features(view, norm=True)[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_of_each_family_bf16_is_within_a_hundredth(name):
    ours = twins(name)[1]
    images = torch.randn(2, 3, ours.img_size, ours.img_size)
    exact = ours.forward_features(images, norm=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.embed(images, None).dtype == torch.float32  # the residual stream stays wide
        rounded = ours.forward_features(images, norm=True)
        alone = ours([images], [None])[0]
    assert (rounded - exact).abs().mean() < 1e-2 * exact.abs().max()
    assert (alone - exact[:, 0]).abs().mean() < 1e-2 * exact.abs().max()


def test_drawn_positions_move_the_training_pass_of_the_anchor_alone():
    options = {"position": "rope", "rope_shift": 0.2, "rope_jitter": 1.5, "rope_rescale": 2.0}
    torch.manual_seed(0)
    network = MSN(model={**SMALL_MODEL, **options}, head=SMALL_HEAD, num_prototypes=10).double()
    anchor, target = network.anchor.trunk, network.target.trunk
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)

    def passed(trunk, seed):
        trunk.draw_positions(torch.Generator().manual_seed(seed))
        return trunk([images], [None])[0]

    still = target([images], [None])[0]
    assert_close(still, anchor([images], [None])[0])
    assert torch.equal(passed(anchor, 1), passed(anchor, 1))
    assert not torch.allclose(passed(anchor, 1), passed(anchor, 2))
    assert_close(anchor.forward_features(images, norm=True)[:, 0], still)
    # In chunks, whose passes are taken twice, gradients are those of the whole batch.
    rand, focal = torch.rand(1, 4, 3, 16, 16).double(), torch.rand(2, 4, 3, 8, 8).double()
    whole, chunks = (
        torch.autograd.grad(
            network.project_anchors(rand, focal, None, size).square().sum(),
            list(anchor.parameters()),
        )
        for size in (None, 3)
    )
    for ours, theirs in zip(chunks, whole, strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_sincos_positions_are_fixed():
    trunk = small(position="sincos")
    assert not trunk.pos_embed.requires_grad
    assert not trunk.pos_embed[0, 0].any()
    assert trunk.pos_embed[0, 1:].unique(dim=0).shape == (16, 24)


def test_a_plain_trunk_says_its_six_numbers_and_no_more():
    assert small().model_config == SMALL_MODEL
    options = {"registers": 2, "class_position": False, "layer_scale": 0.1, "mlp": "swiglu"}
    assert small(**options).model_config == {**SMALL_MODEL, **options}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"registers": -1}, "registers"),
        ({"registers": 4}, "class_position=false"),
        ({"layer_scale": 0}, "layer_scale"),
        ({"mlp": "relu"}, "gelu, swiglu"),
        ({"position": "alibi"}, "learned, sincos, rope"),
        ({"position": "rope", "num_heads": 4}, "multiple of 4"),
        ({"position": "rope", "rope_base": 1.0}, "rope_base"),
        ({"position": "rope", "rope_jitter": 0.5}, "rope_jitter"),
        ({"position": "rope", "class_position": False}, "class_position"),
        ({"rope_rescale": 2.0}, "rope_rescale is of model.position=rope"),
    ],
)
def test_impossible_options_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        small(**wrong)
