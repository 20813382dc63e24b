"""DINOv2 and DINOv3: every kind of file gives what the library or publisher that wrote it computes.

The publishers' layouts are written here from their documented names; weights are random.
"""

import json
import re

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from msn.errors import UserError
from msn.evaluation.backbones import FrozenBackbone
from msn.evaluation.heads import classifier_of
from msn.method.network import MSN
from msn.method.positions import resize_position_embeddings
from msn.weights import build_trunk, initialise, load_backbone, read_weights
from msn.weights.classifier import Classifier
from msn.weights.export import FORMATS, export
from msn.weights.weights import Weights
from tests.conftest import SMALL_HEAD
from tests.method.families import FAMILIES, randomise, timm_model, twins
from tests.weights.conftest import assert_same

_HF = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56}
_V3 = {**_HF, "image_size": 64, "intermediate_size": 256, "num_register_tokens": 4}
HUGGING_FACE = {
    "Dinov2": {"patch_size": 14},
    "Dinov2 SwiGLU": {"patch_size": 14, "use_swiglu_ffn": True},
    "Dinov2WithRegisters": {"patch_size": 14},
    "Dinov2WithRegisters SwiGLU": {"patch_size": 14, "use_swiglu_ffn": True},
    "DINOv3ViT": _V3,
    "DINOv3ViT no bias": _V3 | {"query_bias": False, "value_bias": False},
    "DINOv3ViT SwiGLU": _V3 | {"use_gated_mlp": True, "hidden_act": "silu"},
}
HEADS = {"num_heads": 4}


def hugging_face(kind, form="Model"):
    name = kind.split()[0]
    config = getattr(transformers, f"{name}Config")(**{**_HF, **HUGGING_FACE[kind]})
    return randomise(getattr(transformers, f"{name}{form}")(config))


def published(name):
    """timm's model and its state dict under the names of facebookresearch/dinov2 or dinov3."""
    model = timm_model(name)
    states = {key: value.clone() for key, value in model.state_dict().items()}
    width = states["cls_token"].shape[-1]
    states["mask_token"] = torch.randn(1, width)
    if "dinov2" in name:
        if "reg4" in name:
            states["register_tokens"] = states.pop("reg_token")
            at_class = torch.randn(1, 1, width)
            states["cls_token"] -= at_class
            states["pos_embed"] = torch.cat([at_class, states["pos_embed"]], 1)
        if "giant" in name:
            states = {re.sub(r"mlp\.fc1", "mlp.w12", key): v for key, v in states.items()}
            states = {re.sub(r"mlp\.fc2", "mlp.w3", key): v for key, v in states.items()}
        return model, states
    states["storage_tokens"] = states.pop("reg_token")
    states["rope_embed.periods"] = (100 ** (torch.arange(4) / 4)).bfloat16()
    names = {r"\.gamma_(\d)$": r".ls\1.gamma"}
    if "plus" in name:
        names |= {r"mlp\.fc1_g": "mlp.w1", r"mlp\.fc1_x": "mlp.w2", r"mlp\.fc2": "mlp.w3"}
    for pattern, theirs in names.items():
        states = {re.sub(pattern, theirs, key): value for key, value in states.items()}
    for stem in [key[: -len("q_bias")] for key in states if key.endswith("q_bias")]:
        query, value = states.pop(f"{stem}q_bias"), states.pop(f"{stem}v_bias")
        states[f"{stem}qkv.bias"] = torch.cat([query, torch.randn(width), value])
        mask = torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
        states[f"{stem}qkv.bias_mask"] = mask  # the keys' bias counts nothing
    return model, states


@torch.no_grad()
def assert_features(trunk, theirs, sizes):
    for size in sizes:
        images = torch.randn(2, 3, size, size)
        found = trunk.forward_features(images, norm=True)
        torch.testing.assert_close(found, theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face_directories_compute_the_same_at_three_sizes(tmp_path, kind):
    model = hugging_face(kind)
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    patch = weights.model["patch_size"]
    assert weights.model["img_size"] == 4 * patch
    sizes = (4 * patch, 3 * patch, 7 * patch)
    assert_features(build_trunk(weights), lambda x: model(x).last_hidden_state, sizes)
    torch.save(model.state_dict(), tmp_path / "a.pth")  # as transformers 5 has it in memory
    again = read_weights(tmp_path / "a.pth", **HEADS)
    assert_same(again.trunk, weights.trunk)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_hugging_face_classifiers_give_their_backbone(tmp_path, kind):
    model = hugging_face(kind, "ForImageClassification")
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert {"classifier.weight", "classifier.bias"} <= set(weights.ignored)
    assert_features(build_trunk(weights), lambda x: model.base_model(x).last_hidden_state, [56])


def test_a_gelu_that_is_not_the_family_s_is_refused(tmp_path):
    hugging_face("DINOv3ViT SwiGLU").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(UserError, match="hidden_act must be silu"):
        read_weights(tmp_path)


WRAPPERS = {
    "plain": lambda states: states,
    "teacher, backbone.": lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()}},
    "model, module.": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
    "student.": lambda states: {f"student.{key}": value for key, value in states.items()},
    "_orig_mod.": lambda states: {f"_orig_mod.{key}": value for key, value in states.items()},
    "ema.": lambda s: {"state_dict": {f"ema.module.{k}": v.double() for k, v in s.items()}},
    "chunks": lambda s: {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", k): v for k, v in s.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_publishers_files_compute_the_same_and_name_what_is_left_out(tmp_path, name, wrapper):
    model, states = published(name)
    path = tmp_path / "a.pth"
    torch.save(WRAPPERS[wrapper](states), path)
    weights = read_weights(path, **HEADS)
    trunk = build_trunk(weights).float()
    assert_features(trunk, model.forward_features, [weights.model["img_size"]])
    assert any(name.endswith("mask_token") for name in weights.ignored)
    options = {key: value for key, value in weights.model.items() if key != "img_size"}
    assert options == {k: v for k, v in FAMILIES[name][1].items() if k != "img_size"}
    if "dinov3" in name:
        assert weights.meta["licence"] == "DINOv3 License"


@pytest.mark.parametrize("name", FAMILIES)
def test_bare_files_in_timm_s_names_are_read(tmp_path, name):
    model = timm_model(name)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    weights = read_weights(tmp_path / "a.safetensors", **HEADS)
    assert_same(weights.trunk, model.state_dict())
    assert_features(build_trunk(weights), model.forward_features, [weights.model["img_size"]])


def test_rotary_positions_that_nothing_tells_are_asked_for(tmp_path):
    model = timm_model("vit_small_patch16_dinov3", num_reg_tokens=0)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="init_family=dinov3"):
        read_weights(tmp_path / "a.pth", **HEADS)
    backbone = load_backbone(tmp_path / "a.pth", **HEADS, family="dinov3")
    assert_features(backbone, model.forward_features, [224])
    with pytest.raises(UserError, match="its tensors are those of dinov3"):
        read_weights(tmp_path / "a.pth", **HEADS, family="vit")
    with pytest.raises(UserError, match="init_family must be one of vit, dinov2, dinov3"):
        read_weights(tmp_path / "a.pth", **HEADS, family="clip")


def test_periods_of_another_base_and_biases_of_keys_are_refused(tmp_path):
    _, states = published("vit_small_patch16_dinov3_qkvb")
    path = tmp_path / "a.pth"
    torch.save(states | {"rope_embed.periods": 10.0 ** torch.arange(4)}, path)
    with pytest.raises(UserError, match="periods"):
        read_weights(path, **HEADS)
    torch.save({k: v for k, v in states.items() if not k.endswith("bias_mask")}, path)
    with pytest.raises(UserError, match="keys have a bias"):
        read_weights(path, **HEADS)


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_224", "eva02_tiny_patch14_224"])
def test_other_rotary_models_of_timm_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    save_file({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="nor one of DINOv2"):
        read_weights(tmp_path)


_FORMATS = [
    pytest.param(name, marks=pytest.mark.slow if name == "onnx" else ())
    for name in FORMATS
    if name != "official"
]


@pytest.mark.parametrize("format", _FORMATS)
@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_dinov2",
        "vit_giant_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_small_plus_patch16_dinov3_qkvb",
    ],
)
def test_exports_are_the_family_s_own_models_and_read_back(tmp_path, name, format):
    if format == "onnx" and name != "vit_small_plus_patch16_dinov3_qkvb":
        pytest.skip("seconds each; one shows the way")
    trunk = twins(name)[1]
    meta = {"licence": "DINOv3 License"}
    weights = Weights(trunk.state_dict(), trunk.model_config, "test", meta=meta)
    settings = {"image_size": None, "head": None, "overwrite": False, "lowshot": None}
    report = export(weights, format=format, out=tmp_path / "out", **settings)
    assert report["max_abs_difference"] < 1e-5
    again = read_weights(tmp_path / "out")
    assert again.model == trunk.model_config
    assert_same(again.trunk, trunk.state_dict())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license_name: dinov3-license" in card
    if format == "timm":
        built = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
        assert built.pretrained_cfg["architecture"].endswith(name.partition("patch")[2])


def a_head(width):
    weight = torch.randn(5, width)
    feature = {"feature": "class_token", "centred": True, "normalised": True}
    return Classifier(weight, None, tuple("abcde"), **feature)


@pytest.mark.parametrize("kind", ["dinov2", "reg4_dinov2"])
def test_a_classifier_of_dinov2_reads_the_class_token_alone_and_its_norm_comes_back(tmp_path, kind):
    trunk = twins(f"vit_small_patch14_{kind}")[1]
    weights = Weights(trunk.state_dict(), trunk.model_config, "test", meta={"licence": "mit"})
    settings = {"image_size": None, "overwrite": False, "lowshot": None}
    report = export(
        weights, format="huggingface", out=tmp_path / "out", head=a_head(64), **settings
    )
    assert report["compared"] == "logits of the head"
    assert report["max_abs_difference"] < 1e-5
    assert_same(read_weights(tmp_path / "out").trunk, trunk.state_dict())


def test_transformers_has_no_classifier_of_dinov3(tmp_path):
    trunk = twins("vit_small_patch16_dinov3")[1]
    weights = Weights(trunk.state_dict(), trunk.model_config, "test", meta={"licence": "mit"})
    settings = {"image_size": None, "overwrite": False, "lowshot": None}
    with pytest.raises(UserError, match="no classifier for DINOv3"):
        export(weights, format="huggingface", out=tmp_path / "out", head=a_head(64), **settings)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_fine_tuning_starts_from_the_family_s_own_model(name):
    trunk = twins(name)[1]
    subject = FrozenBackbone("a", trunk, trunk.img_size, (0.5,) * 3, (0.5,) * 3)
    model = classifier_of(subject, 3, drop_path=0.0, seed=0).eval()
    images = torch.randn(2, 3, trunk.img_size, trunk.img_size)
    with torch.no_grad():
        found = model.forward_features(images)
        expected = trunk.forward_features(images, norm=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_layout_of_the_reference_cannot_say_options(tmp_path):
    trunk = twins("vit_small_patch14_dinov2")[1]
    weights = Weights(trunk.state_dict(), trunk.model_config, "test")
    settings = {"image_size": None, "head": None, "overwrite": False, "lowshot": None}
    with pytest.raises(UserError, match="cannot express layer_scale"):
        export(weights, format="official", out=tmp_path / "out", **settings)


@pytest.mark.parametrize(
    ("name", "rule", "said"),
    [
        ("vit_small_patch14_dinov2", {"offset": 0.1}, "offset 0.1, as DINOv2"),
        ("vit_small_patch14_reg4_dinov2", {"antialias": True}, "as DINOv2 with registers"),
        ("vit_small_patch16_dinov3", None, None),
    ],
)
def test_training_starts_with_positions_resized_by_the_family_s_rule(tmp_path, name, rule, said):
    model = FAMILIES[name][1]
    trunk = twins(name)[1]
    torch.save(trunk.state_dict(), tmp_path / "a.pth")
    size = 2 * model["patch_size"]
    ours = {**model, "img_size": size, "qkv_bias": True}
    network = MSN(model=ours, head=SMALL_HEAD, num_prototypes=8)
    rows = dict(initialise(network, read_weights(tmp_path / "a.pth", **HEADS)))
    target = network.target.trunk
    if rule is None:
        assert rows["biases of queries and values"] == "0: the file has none"
        images = torch.randn(1, 3, size, size)
        expected = trunk.forward_features(images, norm=True)
        assert torch.equal(target.forward_features(images, norm=True), expected)
        return
    assert said in rows["target trunk"]
    expected = resize_position_embeddings(trunk.pos_embed, (2, 2), **rule)
    assert torch.equal(target.pos_embed, expected)


def test_another_family_than_the_model_is_refused_by_names(tmp_path):
    torch.save(twins("vit_small_patch16_dinov3")[1].state_dict(), tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth", **HEADS)
    network = MSN(model=FAMILIES["vit_small_patch14_dinov2"][1], head=SMALL_HEAD, num_prototypes=8)
    with pytest.raises(UserError, match="another architecture than model: pos_embed is missing"):
        initialise(network, weights)
