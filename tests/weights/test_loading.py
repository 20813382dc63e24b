"""The loading matrix: right to 1e-5 against the library's own features, or refused in one line."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from msn.errors import UserError
from msn.evaluation.backbones import open_backbone, random_backbone
from msn.evaluation.features import FeatureSettings, forward_feature
from msn.weights import ForeignBackbone, load_backbone, read_weights
from tests.weights.builders import images
from tests.weights.zoo import HUGGING_FACE, SIZE, TIMM, save_hugging_face, save_timm

OURS = ("vit", "vit_msn", "vit_mae", "dinov2", "dinov2_with_registers", "dinov3_vit")
SETTINGS = {"image_size": None, "batch_size": 2, "precision": "32"}
NATIVE = FeatureSettings(feature="native", **SETTINGS)


def measured(path, size=SIZE, feature="native"):
    """Features of random images as an evaluation takes them, and their kind."""
    backbone = open_backbone("x", str(path), image_size=size, num_heads=None)
    settings = FeatureSettings(feature=feature, **SETTINGS)
    backbone.check(settings)
    kind = backbone.kind(settings)
    return forward_feature(backbone.trunk, images(size), kind), kind


@torch.no_grad()
def of_hugging_face(model, kind, size=SIZE):
    """The same feature by transformers alone."""
    model = getattr(model, "vision_model", model)
    more = {} if size == SIZE else {"interpolate_pos_encoding": True}
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
        more["noise"] = torch.arange((size // 8) ** 2).float().expand(2, -1)
    if model.config.model_type in ("pixio", "convnextv2"):
        more = {}
    found = model(images(size), output_hidden_states=True, **more)
    tokens = found.last_hidden_state
    if kind == "pooled":
        return found.pooler_output.flatten(1)
    if kind == "patch_mean":
        return tokens[:, -((size // 8) ** 2) :].mean(dim=1)
    return tokens[:, 0] if kind == "class_token_norm" else found.hidden_states[-1][:, 0]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_directories_give_transformers_features(tmp_path, name):
    model = save_hugging_face(tmp_path, name)
    found, kind = measured(tmp_path)
    if name != "vit_msn":  # whose feature is before the final norm, which transformers 5 hides
        assert_close(found, of_hugging_face(model, kind))
    is_ours = name in (*OURS, "dinov2_swiglu")
    assert isinstance(load_backbone(tmp_path), ForeignBackbone) is not is_ours


@pytest.mark.slow
@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize(
    "name", [n for n in HUGGING_FACE if n not in (*OURS, "dinov2_swiglu", "aimv2_vision_model")]
)
def test_other_sizes_give_transformers_features(tmp_path, name, size):
    model = save_hugging_face(tmp_path, name)
    found, kind = measured(tmp_path, size)
    assert_close(found, of_hugging_face(model, kind, size))


@pytest.mark.parametrize("name", TIMM)
def test_timm_directories_give_timm_features(tmp_path, name):
    model = save_timm(tmp_path, name)
    with torch.no_grad():
        expected = model(images(SIZE))
        if "dinov3" in name:  # timm averages tokens, the family takes the class token
            expected = model.forward_features(images(SIZE))[:, 0]
    assert_close(measured(tmp_path)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize("name", [n for n in TIMM if "dino" not in n and "deit3" not in n])
def test_other_sizes_give_timm_features(tmp_path, name, size):
    save_timm(tmp_path, name)
    sized = {} if name in ("convnext_atto", "resnet10t") else {"img_size": size}
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, **sized)
    with torch.no_grad():
        assert_close(measured(tmp_path, size)[0], model.eval()(images(size)))


@pytest.mark.parametrize("layout", ["bare", "model", "module.", "half", "head"])
def test_named_files_give_timm_features(tmp_path, layout):
    model = timm.create_model("convnext_atto", num_classes=3).eval()
    states = model.state_dict()
    if layout == "half":
        model.half().float()
        states = {name: tensor.half() for name, tensor in states.items()}
    if layout == "head":
        states = {n: t for n, t in states.items() if not n.startswith("head.fc.")}
    content = {"model": states} if layout in ("model", "half") else states
    if layout == "module.":
        content = {"state_dict": states, "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images(SIZE)), pre_logits=True)
    assert_close(measured(f"timm/convnext_atto@{tmp_path / 'a.pth'}")[0], expected)


def test_sharded_and_pickled_directories_are_the_same(tmp_path):
    model = save_hugging_face(tmp_path / "a", "beit")
    expected = measured(tmp_path / "a")[0]
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    (tmp_path / "a" / "model.safetensors").unlink(missing_ok=True)
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file()
    assert_close(measured(tmp_path / "a")[0], expected)
    save_hugging_face(tmp_path / "b", "beit")
    states = load_file(tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "model.safetensors").unlink()
    torch.save(states, tmp_path / "b" / "pytorch_model.bin")
    assert_close(measured(tmp_path / "b")[0], expected)


def change(path, **entries):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"auto_map": {"AutoModel": "code.Net"}}, "auto_map names code"),
        ({"quantization_config": {"bits": 4}}, "quantized|quantised"),
        ({"backbone": "resnet50"}, "another backbone to fetch"),
        ({"model_type": "nothing"}, "has no model_type 'nothing'"),
        ({"hidden_size": 32}, "cannot open it|another shape"),
        ({"num_hidden_layers": 3}, "is missing"),
    ],
)
def test_configurations_that_are_refused(tmp_path, entries, message):
    save_hugging_face(tmp_path, "beit")
    change(tmp_path / "config.json", **entries)
    with pytest.raises(UserError, match=message) as error:
        measured(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "entries",
    [{"pos_embed_rope_min_period": 0.5, "pos_embed_rope_max_period": 9.0}]
    + [{"pos_embed_rope_max_period": 9.0}, {"pos_embed_rope_normalize_coords": "max"}],
)
def test_rotary_positions_that_no_library_here_computes_are_refused(tmp_path, entries):
    save_hugging_face(tmp_path, "dinov3_vit")
    change(tmp_path / "config.json", **entries)
    for read in (read_weights, measured):
        with pytest.raises(UserError, match=f"{next(iter(entries))} must be "):
            read(tmp_path)


@pytest.mark.parametrize(
    "what", ["adapter", "processor", "oblong", "nan", "int8", "pooler", "extra"]
)
def test_directories_that_are_refused(tmp_path, what):
    save_hugging_face(tmp_path, "beit")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    name = "embeddings.cls_token"
    if what == "adapter":
        (tmp_path / "adapter_config.json").write_text("{}")
    elif what == "processor":
        (tmp_path / "preprocessor_config.json").unlink()
    elif what == "oblong":
        sizes = {"height": 32, "width": 16}
        change(tmp_path / "preprocessor_config.json", size=sizes)
    elif what == "extra":
        tensors["layers.9.weight"] = torch.ones(3)
    elif what == "pooler":
        tensors = {n: t for n, t in tensors.items() if not n.startswith("pooler.")}
    else:
        bad = torch.full_like(tensors[name], torch.nan)
        tensors[name] = bad if what == "nan" else tensors[name].to(torch.int8)
    save_file(tensors, weights)
    messages = {
        "adapter": "holds an adapter",
        "processor": "has no preprocessor_config.json",
        "oblong": "one square",
        "nan": "NaN or infinity",
        "int8": "is int8",
        "pooler": "its library pools nothing",
        "extra": "layers.9.weight is not expected",
    }
    with pytest.raises(UserError, match=messages[what]):
        measured(tmp_path)


def test_timm_files_that_are_refused(tmp_path):
    save_timm(tmp_path, "beit_base_patch16_224")
    weights = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"checkpoint=timm/MODEL@FILE names"):
        measured(weights)
    with pytest.raises(UserError, match="the file is not of timm's eva02_tiny_patch14_224"):
        measured(f"timm/eva02_tiny_patch14_224@{weights}")
    tensors = load_file(weights)
    save_file({n: t for n, t in tensors.items() if n != "fc_norm.bias"}, weights)
    with pytest.raises(UserError, match="fc_norm.bias is missing"):
        measured(tmp_path)
    change(tmp_path / "config.json", model_args={"checkpoint_path": "/x"})
    with pytest.raises(UserError, match="not about the network|checkpoint_path"):
        measured(tmp_path)


def test_what_is_measured_is_not_trained(tmp_path):
    save_hugging_face(tmp_path, "siglip_vision_model")
    with pytest.raises(UserError, match="can be measured, but not trained from or exported"):
        read_weights(tmp_path)


def test_features_that_a_family_lacks_name_its_own(tmp_path):
    save_hugging_face(tmp_path, "siglip_vision_model")
    with pytest.raises(UserError, match="no class token; feature=native takes pooled"):
        measured(tmp_path, feature="class_token")
    with pytest.raises(UserError, match="only our own trunk has it"):
        measured(tmp_path, feature="last_2")
    tokens = measured(tmp_path, feature="patch_mean")[0]
    assert tokens.shape == (2, 24)


def test_the_random_baseline_has_the_same_network_and_other_weights(tmp_path):
    save_hugging_face(tmp_path, "beit")
    backbone = open_backbone("x", str(tmp_path), image_size=None, num_heads=None)
    first, second = (random_backbone(backbone, seed=seed) for seed in (0, 0))
    rows = [forward_feature(b.trunk, images(SIZE), "pooled") for b in (backbone, first, second)]
    assert torch.equal(rows[1], rows[2])
    assert not torch.allclose(rows[0], rows[1])
    assert backbone.preprocessing["image_mean"] == [0.4] * 3
