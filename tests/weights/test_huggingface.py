import json

import pytest
import torch

from msn.errors import UserError
from msn.weights import build_trunk, load_backbone, read_weights
from msn.weights.huggingface import from_huggingface, model_config, to_huggingface
from tests.weights.builders import MODEL, images, make_trunk, shaken
from tests.weights.conftest import assert_same

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}


def save(directory, name, **more):
    """A randomly initialised model of transformers, written by its own save_pretrained."""
    config = getattr(
        transformers, f"{name.removesuffix('ForPreTraining').removesuffix('Model')}Config"
    )
    kind = name if name.endswith("ForPreTraining") else f"{name.removesuffix('Model')}Model"
    torch.manual_seed(0)
    model = shaken(getattr(transformers, kind)(config(**SIZES, **more)))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("name", "source"), [("ViTMSN", "huggingface"), ("ViT", "huggingface vit")]
)
def test_directories_of_transformers_give_its_features(tmp_path, name, source):
    model = save(tmp_path, name, layer_norm_eps=1e-6)
    weights = read_weights(tmp_path)
    assert weights.source == source
    assert weights.model == MODEL
    assert not weights.heads_assumed
    with torch.no_grad():
        expected = model(images(32)).last_hidden_state
        found = build_trunk(weights).forward_features(images(32), norm=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ViTMAEModel", "ViTMAEForPreTraining"])
def test_mae_directories_give_its_class_token(tmp_path, name):
    model = save(tmp_path, name, layer_norm_eps=1e-6, mask_ratio=0.0)
    weights = read_weights(tmp_path)
    assert weights.source == "huggingface mae"
    assert any("decoder" in key for key in weights.ignored) is (name == "ViTMAEForPreTraining")
    encoder = getattr(model, "vit", model)
    with torch.no_grad():
        expected = encoder(images(32)).last_hidden_state[:, 0]
        found = build_trunk(weights).forward_features(images(32), norm=True)[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_published_weights_keep_their_licence_and_others_are_of_unknown_one(tmp_path):
    save(tmp_path / "msn", "ViTMSN")
    save(tmp_path / "mae", "ViTMAEModel")
    assert read_weights(tmp_path / "msn").meta["licence"] == "CC BY-NC 4.0"
    assert read_weights(tmp_path / "mae").meta["licence"].startswith("unknown")


def test_names_survive_the_round_trip_bit_by_bit():
    states = make_trunk().state_dict()
    theirs = to_huggingface(states)
    assert "encoder.layer.1.attention.attention.query.weight" in theirs
    again, ignored = from_huggingface({f"vit.{name}": tensor for name, tensor in theirs.items()})
    assert ignored == ()
    assert_same(again, states)


def test_our_names_are_those_that_transformers_itself_writes(tmp_path):
    from safetensors import safe_open

    save(tmp_path, "ViTMSN")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(to_huggingface(make_trunk().state_dict()))


def test_the_configuration_is_the_one_that_transformers_writes(tmp_path):
    save(tmp_path, "ViTMSN")
    theirs = json.loads((tmp_path / "config.json").read_text())
    ours = model_config(MODEL, None)
    assert {key: theirs[key] for key in ours} == ours
    assert set(theirs) - set(ours) == {"dtype", "transformers_version"}


def test_normalisation_is_taken_from_the_preprocessing_file(tmp_path):
    save(tmp_path, "ViT")
    content = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert read_weights(tmp_path).meta["std"] == [0.25, 0.25, 0.25]
    assert load_backbone(tmp_path).transform.transforms[-1].mean == [0.5, 0.5, 0.5]


def test_a_model_that_computes_something_else_is_refused(tmp_path):
    save(tmp_path, "ViTMSN", hidden_act="relu")
    with pytest.raises(UserError, match="hidden_act must be gelu, got 'relu'"):
        read_weights(tmp_path)


def test_a_missing_part_of_attention_is_named():
    theirs = to_huggingface(make_trunk().state_dict())
    del theirs["encoder.layer.1.attention.attention.key.weight"]
    trunk, _ = from_huggingface(theirs)
    assert "blocks.1.attn.qkv.weight" not in trunk
