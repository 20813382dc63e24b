import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import msn
from msn.errors import UserError
from msn.evaluation.backbones import open_backbone
from msn.weights import build_trunk, read_weights, save_backbone
from tests.weights.builders import (
    MODEL,
    PATCH_4,
    PATCH_7,
    golden,
    make_network,
    make_trunk,
    meta_of,
    released_layout,
    save_checkpoint,
    save_run,
)
from tests.weights.conftest import assert_same

GOLDEN_NAMES = ("default", "no_sinkhorn", "wide")


def test_our_checkpoint_gives_everything(tmp_path):
    network = make_network()
    path = save_checkpoint(
        tmp_path / "a.ckpt", network, init="released.pth.tar", licence="CC BY-NC 4.0"
    )
    weights = read_weights(path)
    assert weights.source == "msn checkpoint"
    assert weights.model == MODEL
    assert not weights.heads_assumed
    assert_same(weights.trunk, network.target.trunk.state_dict())
    assert_same(weights.head, network.target.head.state_dict())
    assert_same(weights.anchor_trunk, network.anchor.trunk.state_dict())
    assert_same(weights.anchor_head, network.anchor.head.state_dict())
    assert torch.equal(weights.prototypes, network.prototypes)
    assert weights.meta["epoch"] == 5
    assert weights.meta["init"] == "released.pth.tar"
    assert weights.meta["licence"] == "CC BY-NC 4.0"


@pytest.mark.parametrize("model", [MODEL, PATCH_4, PATCH_7])
def test_our_backbone_comes_back_with_its_six_numbers(tmp_path, model):
    trunk = make_trunk(**model)
    save_run(tmp_path, trunk, data={"source": "digits"})
    for path in (tmp_path, tmp_path / "backbone.safetensors"):
        weights = read_weights(path)
        assert weights.source == "backbone.safetensors"
        assert weights.model == model
        assert_same(build_trunk(weights).state_dict(), trunk.state_dict())
        assert weights.meta["data"] == {"source": "digits"}
        assert weights.meta["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("ratio", [4, 2.5, 8 / 3, 1.7, 0.3])
def test_any_mlp_ratio_is_read_off_the_shapes(tmp_path, ratio):
    trunk = make_trunk(embed_dim=30, num_heads=1, mlp_ratio=ratio)
    torch.save(trunk.state_dict(), tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth", num_heads=1)
    assert_same(build_trunk(weights).state_dict(), trunk.state_dict())


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_plain_state_dict_is_read_under_any_usual_name(tmp_path, suffix, prefix):
    trunk = make_trunk()
    states = {prefix + name: tensor for name, tensor in trunk.state_dict().items()}
    path = tmp_path / f"a.{suffix}"
    save_file(states, path) if suffix == "safetensors" else torch.save(states, path)
    weights = read_weights(path, num_heads=3)
    assert weights.source == "state dict"
    assert_same(weights.trunk, trunk.state_dict())


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrapped_state_dicts_lose_classifier_and_decoder(tmp_path, wrapper):
    trunk = make_trunk()
    extra = {"head.weight": torch.zeros(2, 24), "decoder_embed.bias": torch.zeros(3)}
    torch.save({wrapper: {**trunk.state_dict(), **extra}, "epoch": 1}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth", num_heads=3)
    assert_same(weights.trunk, trunk.state_dict())
    assert set(weights.ignored) == set(extra)


def test_heads_are_the_callers_word_where_the_file_has_none(tmp_path):
    trunk = make_trunk(embed_dim=192)
    torch.save(trunk.state_dict(), tmp_path / "a.pth")
    assumed = read_weights(tmp_path / "a.pth")
    assert (assumed.model["num_heads"], assumed.heads_assumed) == (3, True)
    told = read_weights(tmp_path / "a.pth", num_heads=6)
    assert (told.model["num_heads"], told.heads_assumed) == (6, False)
    save_run(tmp_path, trunk)
    assert read_weights(tmp_path, num_heads=6).model["num_heads"] == 3


def test_a_guess_of_heads_is_said_where_features_are_made_with_it(tmp_path, caplog):
    torch.save(make_trunk(embed_dim=192).state_dict(), tmp_path / "a.pth")
    msn.load_backbone(tmp_path / "a.pth", num_heads=3)
    open_backbone("a", str(tmp_path / "a.pth"), image_size=None, num_heads=3)
    assert caplog.text == ""
    msn.load_backbone(tmp_path / "a.pth")
    open_backbone("a", str(tmp_path / "a.pth"), image_size=None, num_heads=None)
    assert caplog.text.count("3 assumed (width // 64); model.num_heads overrides") == 2


@pytest.mark.parametrize("width", [24, 96])
def test_heads_of_an_unusual_width_are_not_guessed(tmp_path, width):
    torch.save(make_trunk(embed_dim=width).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"width {width} is no multiple .* give model.num_heads"):
        read_weights(tmp_path / "a.pth")


def test_a_run_without_backbone_gives_its_newest_checkpoint_by_name(tmp_path):
    names = {1: "epoch-9-step-90", 2: "epoch-10-step-100", 3: "epoch-10-step-95"}
    for age, (seed, name) in enumerate(names.items()):
        path = save_checkpoint(tmp_path / "checkpoints" / f"{name}.ckpt", make_network(seed))
        os.utime(path, (1e9 + age, 1e9 + age))  # as a copy would have them
    assert_same(read_weights(tmp_path).trunk, make_network(2).target.trunk.state_dict())


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("only_target", [False, True])
def test_released_files_give_the_features_of_the_reference(tmp_path, name, only_target):
    figures, config = golden(name)
    torch.save(released_layout(name, only_target), tmp_path / "a.pth.tar")
    weights = read_weights(tmp_path / "a.pth.tar", num_heads=config["num_heads"])
    assert weights.source == "released"
    assert weights.meta["licence"] == "CC BY-NC 4.0"
    assert (weights.anchor_trunk is None) is only_target
    _assert_features(build_trunk(weights), figures)


def _assert_features(trunk, figures):
    sizes = sorted({int(key.split(".")[1]) for key in figures if key.startswith("features.")})
    assert len(sizes) == 3
    for size in sizes:
        pixels = figures[f"features.{size}.in"].float()
        for norm, key in ((False, "out"), (True, "out_norm")):
            found = trunk.forward_features(pixels, norm=norm)[:, 0]
            expected = figures[f"features.{size}.{key}"].float()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif("MSN_TEST_REFERENCE" not in os.environ, reason="MSN_TEST_REFERENCE is not set")
@pytest.mark.parametrize("name", [*GOLDEN_NAMES, "target_only"])
def test_stored_released_files_give_the_features_of_the_reference(name):
    path = Path(os.environ["MSN_TEST_REFERENCE"]) / f"released_format_{name}.pth.tar"
    figures, config = golden("default" if name == "target_only" else name)
    weights = read_weights(path, num_heads=config["num_heads"])
    assert_same(weights.head, read_weights(path).head)
    assert weights.prototypes.shape == figures["prototypes.final"].shape
    _assert_features(build_trunk(weights), figures)


@pytest.mark.parametrize(
    ("header", "licence"),
    [
        ({"init": None}, "not stated (trained from scratch"),
        ({"init": "somebody.pth"}, "unknown"),
        ({"init": "msn.pth.tar", "licence": "CC BY-NC 4.0"}, "CC BY-NC 4.0"),
    ],
)
def test_the_licence_is_what_the_file_says_and_never_invented(tmp_path, header, licence):
    trunk = make_trunk()
    meta = {"model": trunk.model_config, **header}
    save_backbone(tmp_path / "backbone.safetensors", trunk.state_dict(), meta)
    assert read_weights(tmp_path).meta["licence"].startswith(licence)


def test_half_precision_files_are_widened_exactly(tmp_path):
    states = {name: tensor.bfloat16() for name, tensor in make_trunk().state_dict().items()}
    save_file(states, tmp_path / "a.safetensors")
    weights = read_weights(tmp_path / "a.safetensors", num_heads=3)
    assert {tensor.dtype for tensor in weights.trunk.values()} == {torch.float32}
    assert_same({name: tensor.bfloat16() for name, tensor in weights.trunk.items()}, states)


def test_double_precision_is_kept(tmp_path):
    states = make_trunk().double().state_dict()
    torch.save(states, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth", num_heads=3)
    assert_same(build_trunk(weights).state_dict(), states)


def test_another_architecture_names_at_most_ten_differences(tmp_path):
    states = make_trunk(depth=6).state_dict()
    states |= {
        f"blocks.{i}.{name}.gamma": torch.ones(24) for i in range(6) for name in ("ls1", "ls2")
    }
    del states["norm.weight"]
    states["norm.bias"] = torch.zeros(7)
    torch.save(states, tmp_path / "a.pth")
    with pytest.raises(UserError, match="another architecture") as error:
        read_weights(tmp_path / "a.pth")
    message = str(error.value)
    assert "norm.weight is missing" in message
    assert "norm.bias is [7] instead of [24]" in message
    assert "blocks.0.ls1.gamma [24] is not expected" in message
    assert message.endswith("and 4 more")
    assert message.count(";") == 10
    assert "\n" not in message


def test_a_convolutional_network_is_another_architecture(tmp_path):
    states = {f"layer{i}.conv.weight": torch.zeros(2, 2, 3, 3) for i in range(40)}
    torch.save(states, tmp_path / "a.pth")
    with pytest.raises(UserError, match="another architecture") as error:
        read_weights(tmp_path / "a.pth")
    assert "pos_embed is missing" in str(error.value)
    assert "layer0.conv.weight [2, 2, 3, 3] is not expected" in str(error.value)


@pytest.mark.parametrize(
    "content", [{}, {"a": 1}, [1, 2], 3, {"target_encoder": {}}, {"model": {}}]
)
def test_plain_data_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: "):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("shape", [(24,), (1, 0, 24), (1, 20, 24), (1, 1, 24)])
def test_wrong_position_embeddings_are_refused(tmp_path, shape):
    torch.save({**make_trunk().state_dict(), "pos_embed": torch.zeros(shape)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="pos_embed|img_size"):
        read_weights(tmp_path / "a.pth")


def test_an_empty_directory_says_what_is_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"backbone\.safetensors, config\.json"):
        read_weights(tmp_path)


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "bert"}', '{"architecture": "no"}'])
def test_a_model_directory_with_a_wrong_config_is_refused(tmp_path, config):
    save_file(make_trunk().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"config\.json"):
        read_weights(tmp_path)


def test_a_model_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_msn"}))
    with pytest.raises(UserError, match="none of model.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize("header", ["{", "[]", '{"model": 3}', '{"format": 2}', '{"norm": [1]}'])
def test_a_damaged_or_newer_header_is_refused(tmp_path, header):
    save_file(make_trunk().state_dict(), tmp_path / "a.safetensors", {"msn": header})
    with pytest.raises(UserError, match="header|format 2"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("heads", [0, -1, "three", 2.5, 5])
def test_impossible_heads_in_a_header_are_refused(tmp_path, heads):
    trunk = make_trunk()
    meta = meta_of(trunk, model={**trunk.model_config, "num_heads": heads})
    save_backbone(tmp_path / "backbone.safetensors", trunk.state_dict(), meta)
    with pytest.raises(UserError, match="num_heads"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", [{0: torch.zeros(2)}, {"model": {1: torch.zeros(2)}}])
def test_names_that_are_no_text_are_no_weights(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        read_weights(tmp_path / "a.pth")


def test_prototypes_that_are_no_tensor_are_none(tmp_path):
    layout = {**released_layout("default"), "prototypes": [1.0, 2.0]}
    torch.save(layout, tmp_path / "a.pth.tar")
    assert read_weights(tmp_path / "a.pth.tar", num_heads=2).prototypes is None


@pytest.mark.parametrize("mean", [None, [0.5], "x", [0.5, 0.5, "x"]])
def test_a_header_without_three_means_is_refused(tmp_path, mean):
    trunk = make_trunk()
    meta = {**meta_of(trunk), "mean": mean}
    save_backbone(tmp_path / "a.safetensors", trunk.state_dict(), meta)
    with pytest.raises(UserError, match=r"header mean: must be three numbers"):
        read_weights(tmp_path / "a.safetensors")
