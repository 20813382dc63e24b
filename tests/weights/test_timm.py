import json

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from msn.errors import UserError
from msn.evaluation.backbones import open_backbones
from msn.method.vit import VisionTransformer
from msn.weights import build_trunk, load_backbone, read_weights, save_backbone
from msn.weights import timm as adapter
from tests.conftest import ROOT
from tests.weights.builders import MODEL, images, make_trunk, shaken
from tests.weights.conftest import assert_same

# But of_init, whose numbers are those of a file.
PRESETS = sorted(
    set((ROOT / "configs/model").glob("*.yaml")) - {ROOT / "configs/model/of_init.yaml"}
)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_strictly_into_timm_and_back(preset):
    model = yaml.safe_load(preset.read_text())
    with torch.device("meta"):
        ours = VisionTransformer(**model)
        name, arguments = adapter.architecture(ours.model_config)
        theirs = timm.create_model(name, **arguments, num_classes=0)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("size", [16, 48])
def test_other_image_sizes_load_strictly_into_timm(size):
    trunk = make_trunk(img_size=size)
    model = adapter.timm_twin(trunk.state_dict(), trunk.model_config)
    with torch.no_grad():
        found, expected = model(images(size)), trunk.forward_features(images(size), norm=True)[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def timm_directory(path, **config):
    """A directory in timm's layout, of a model with a classifier, written by timm alone."""
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5)
    shaken(model)
    path.mkdir(parents=True)
    save_file(model.state_dict(), path / "model.safetensors")
    content = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "license": "mit"},
        **config,
    }
    (path / "config.json").write_text(json.dumps(content))
    return model


def test_a_directory_of_timm_gives_its_features_heads_and_normalisation(tmp_path):
    model = timm_directory(tmp_path / "a")
    weights = read_weights(tmp_path / "a")
    assert weights.source == "timm"
    assert (weights.model["num_heads"], weights.notes) == (3, ())
    assert set(weights.ignored) == {"head.weight", "head.bias"}
    assert weights.meta["licence"] == "mit"
    with torch.no_grad():
        expected = model.forward_features(images(32))
        found = build_trunk(weights).forward_features(images(32), norm=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert load_backbone(tmp_path / "a").transform.transforms[-1].std == [0.5] * 3


def test_heads_in_the_model_arguments_win_over_the_architecture(tmp_path):
    timm_directory(tmp_path / "a", model_args={"num_heads": 6})
    assert read_weights(tmp_path / "a").model["num_heads"] == 6


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_another_kind_of_network_is_refused(tmp_path, name):
    timm_directory(tmp_path / "a", architecture=name)
    with pytest.raises(UserError, match="not a plain vision transformer"):
        read_weights(tmp_path / "a")


def test_a_vision_transformer_with_normalised_queries_is_another_architecture(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, qk_norm=True)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.q_norm\.weight \[64\] is not expected"):
        read_weights(tmp_path / "a.pth")


def test_a_state_dict_of_timm_is_read_as_it_is(tmp_path):
    model = shaken(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=0))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert weights.model == {**MODEL, "patch_size": 16, "embed_dim": 192}
    assert_same(weights.trunk, model.state_dict())


def test_a_configuration_with_empty_parts_tells_what_it_can(tmp_path):
    timm_directory(tmp_path / "a", pretrained_cfg=None, model_args=None)
    assert read_weights(tmp_path / "a").model["num_heads"] == 3
    timm_directory(tmp_path / "b", pretrained_cfg={"mean": [0.5], "std": None})
    with pytest.raises(UserError, match="mean: must be three numbers"):
        read_weights(tmp_path / "b")


def named(model, path, num_heads=None):
    (opened,) = open_backbones(f"timm/{model}@{path}", image_size=None, num_heads=num_heads)
    return opened


def test_a_file_of_a_named_model_is_compared_with_it(tmp_path):
    model = shaken(timm.create_model("vit_tiny_patch16_224", img_size=32))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert_same(
        named("vit_tiny_patch16_224", tmp_path / "a.pth").trunk.state_dict(),
        {name: t for name, t in model.state_dict().items() if not name.startswith("head.")},
    )
    for other in ("vit_small_patch16_224", "vit_tiny_patch16_384.augreg_in21k_ft_in1k"):
        if other.startswith("vit_small"):
            with pytest.raises(
                UserError, match="file is of another model: cls_token is .1, 1, 192"
            ):
                named(other, tmp_path / "a.pth")
        else:
            assert named(other, tmp_path / "a.pth").trunk.num_heads == 3
    # Whose 14 heads do not divide the file's width: the shapes are the reason all the same.
    with pytest.raises(UserError, match="file is of another model: blocks.0.ls1.gamma is missing"):
        named("vit_base_patch16_plus_240", tmp_path / "a.pth")


def test_a_file_that_says_other_heads_than_the_named_model_is_refused(tmp_path):
    trunk = make_trunk(embed_dim=192, depth=12, num_heads=6, patch_size=16)
    save_backbone(tmp_path / "a.safetensors", trunk.state_dict(), {"model": trunk.model_config})
    with pytest.raises(UserError, match="it has 6 attention heads instead of 3"):
        named("vit_tiny_patch16_224", tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_18x2_224", "vit_base_patch16_xp_224", "vit_base_patch16_rpn_224"]
    + ["vit_base_mci_224", "vit_base_patch16_clip_quickgelu_224", "vit_base_patch32_siglip_256"]
    + ["resnet18", "no_such_model", "eva02_tiny_patch14_224", ["vit_tiny_patch16_224"], None],
)
def test_models_that_our_trunk_does_not_compute_are_one_line(tmp_path, name):
    torch.save(make_trunk(embed_dim=192).state_dict(), tmp_path / "a.pth")
    if isinstance(name, str):
        with pytest.raises(UserError, match=name):
            named(name, tmp_path / "a.pth")
    timm_directory(tmp_path / "a", architecture=name)
    with pytest.raises(UserError, match="architecture"):
        read_weights(tmp_path / "a")


@pytest.mark.parametrize(
    "arguments",
    [{"act_layer": "quick_gelu"}, {"norm_layer": "rmsnorm"}, {"block_fn": "x"}, {"depth_": 1}]
    + [{"img_size": [16, 64]}],
)
def test_arguments_that_change_what_is_computed_are_refused(tmp_path, arguments):
    timm_directory(tmp_path / "a", model_args=arguments)
    with pytest.raises(UserError, match="model_args|only square"):
        read_weights(tmp_path / "a")


def test_normalisation_that_is_not_told_is_said(tmp_path):
    timm_directory(tmp_path / "a", pretrained_cfg={})
    said = "mean and std of ImageNet assumed: config.json says none"
    assert said in read_weights(tmp_path / "a").notes


@pytest.mark.parametrize("kind", ["dict", "module."])
def test_families_are_named_in_the_refusal(tmp_path, kind):
    families = {
        "vit_base_patch16_clip_224": "CLIP",
        "vit_base_patch16_siglip_224": "without class token",
        "deit_tiny_distilled_patch16_224": "distilled DeiT",
        "beit_base_patch16_224": "BEiT",
        "eva02_tiny_patch14_224": "EVA-02",
    }
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "image_size": 32, "patch_size": 16}
    with torch.device("meta"):
        models = {
            timm.create_model(name, depth=1, num_classes=0): family
            for name, family in families.items()
        }
        models[CLIPVisionModel(CLIPVisionConfig(**small, **heads))] = "CLIP"
        models[SiglipVisionModel(SiglipVisionConfig(**small, **heads))] = "CLIP or SigLIP"
        models[torchvision.models.VisionTransformer(32, 16, 1, 1, 8, 16)] = "torchvision"
    for model, family in models.items():
        states = {n: torch.zeros(t.shape) for n, t in model.state_dict().items()}
        content = {kind + n: t for n, t in states.items()} if kind == "module." else {"m": states}
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(
            UserError,
            match=rf"\(.*({family}).*it can be measured, but not trained from or exported\)",
        ):
            read_weights(tmp_path / "a.pth", num_heads=1)
