import json

import pytest
import torch
from huggingface_hub import hf_hub_url
from safetensors.torch import load_file, save_file

from msn.errors import UserError
from msn.weights import build_trunk, load_backbone, read_weights
from msn.weights.export import export
from msn.weights.huggingface import from_huggingface, model_config, to_huggingface
from tests.weights.builders import (
    MODEL,
    images,
    make_network,
    make_trunk,
    save_checkpoint,
    shaken,
)
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
    assert weights.notes == (
        "mean and std of ImageNet assumed: preprocessor_config.json says none",
    )
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


def test_the_licence_is_what_the_directory_or_its_origin_says(tmp_path):
    save(tmp_path, "ViTMSN")
    assert read_weights(tmp_path).meta["licence"].startswith("unknown")
    config = json.loads((tmp_path / "config.json").read_text())
    content = {**config, "_name_or_path": "facebook/vit-msn-small"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_weights(tmp_path).meta["licence"] == "CC BY-NC 4.0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text("---\ntags:\n- x\nlicense: mit\n---\n# A card\n")
    assert read_weights(tmp_path).meta["licence"] == "mit"
    card = "---\nlicense: other\nlicense_name: my-terms\nlicense_link: LICENSE\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert read_weights(tmp_path).meta["licence"] == "my-terms"


@pytest.mark.parametrize(
    ("link", "place", "lines", "text"),
    [
        ("https://x.org/terms", ".", ["license_link: https://x.org/terms"], "Its text: <https:"),
        ("LICENSE.md", ".", [], "as `LICENSE.md`, a file beside that card"),
        (
            "LICENSE.md",
            "models--org--name/snapshots/abc",
            [f"license_link: {hf_hub_url('org/name', 'LICENSE.md', revision='abc')}"],
            "Its text: <http",
        ),
        ("README.md#licence", ".", [], "Of the weights: my-terms.\n"),  # an older card of ours
    ],
)
def test_the_text_of_a_licence_is_where_the_source_says(tmp_path, link, place, lines, text):
    source = tmp_path / place
    save(source, "ViTMSN")
    card = f"---\nlicense: other\nlicense_name: my-terms\nlicense_link: {link}\n---\n"
    (source / "README.md").write_text(card)
    for out in ("one", "two"):  # the link travels
        export(
            read_weights(source),
            format="huggingface" if out == "one" else "timm",
            out=tmp_path / out,
            image_size=None,
            head=None,
            overwrite=False,
            lowshot=None,
        )
        made = (tmp_path / out / "README.md").read_text()
        head = made.split("---")[1].strip().splitlines()
        assert [line for line in head if line.startswith("license_link")] == lines
        assert head[:2] == ["license: other", "license_name: my-terms"]
        assert text in made
        source = tmp_path / out


def test_fewer_or_more_blocks_than_the_configuration_says_are_refused(tmp_path):
    save(tmp_path, "ViTMSN")
    config = json.loads((tmp_path / "config.json").read_text())
    for blocks in (1, 99999999):
        content = {**config, "num_hidden_layers": blocks}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"says {blocks} blocks, the weights have "):
            read_weights(tmp_path)


def test_own_weights_saved_again_by_transformers_get_no_invented_licence(tmp_path):
    network = make_network()
    save_checkpoint(tmp_path / "a.ckpt", network, licence="Apache-2.0")
    export(
        read_weights(tmp_path / "a.ckpt"),
        **{"format": "huggingface", "out": tmp_path / "out", "image_size": None},
        **{"head": None, "overwrite": False, "lowshot": None},
    )
    assert read_weights(tmp_path / "out").meta["licence"] == "Apache-2.0"
    model = transformers.ViTMSNModel.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert read_weights(tmp_path / "again").meta["licence"] == "Apache-2.0"


def test_the_eps_of_the_file_is_computed_with(tmp_path):
    model = save(tmp_path, "ViTMAEModel", mask_ratio=0.0)
    for parameter in model.parameters():
        parameter.data.mul_(1e-4)  # where eps matters most
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert backbone.model_config["layer_norm_eps"] == 1e-12
    with torch.no_grad():
        expected = model(images(32)).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone(images(32)), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("content", "mean", "std"),
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 0.5, 0.25),
        ({"do_normalize": False, "do_rescale": False}, 0.0, 1 / 255),
        ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}, 0.5, 0.2),
    ],
)
def test_preprocessing_that_does_not_normalise_is_followed_and_said(tmp_path, content, mean, std):
    save(tmp_path, "ViT")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    weights = read_weights(tmp_path)
    assert weights.meta["mean"] == pytest.approx([mean] * 3)
    assert weights.meta["std"] == pytest.approx([std] * 3)
    said = "images are not normalised, as preprocessor_config.json says" in weights.notes
    assert said is (mean == 0.0)


def test_state_dicts_of_transformers_5_in_memory_are_read(tmp_path):
    model = save(tmp_path / "dir", "ViTMSN")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert_same(
        read_weights(tmp_path / "a.pth", num_heads=3).trunk, read_weights(tmp_path / "dir").trunk
    )


@pytest.mark.parametrize(
    "name", ["embeddings.register_tokens", "layer_scale1.lambda1", "extra.weight"]
)
def test_a_directory_with_unknown_tensors_is_refused(tmp_path, name):
    save(tmp_path, "ViT")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, name: torch.ones(24)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name} \[24\] is not expected"):
        read_weights(tmp_path)


def test_yolos_is_another_architecture(tmp_path):
    config = transformers.YolosConfig(**{**SIZES, "image_size": [32, 32]})
    torch.save(transformers.YolosModel(config).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="another architecture .YOLOS"):
        read_weights(tmp_path / "a.pth", num_heads=3)


@pytest.mark.parametrize("kind", ["beit", "deit", ["vit"], None, {"a": 1}])
def test_another_family_is_named(tmp_path, kind):
    save(tmp_path, "ViT")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match="model_type must be one of") as error:
        read_weights(tmp_path)
    if isinstance(kind, str):
        assert f"'{kind}': it can be measured, but not trained" in str(error.value)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu_new", ["gelu"]])
def test_another_gelu_is_refused_where_the_configuration_tells(tmp_path, act):
    save(tmp_path, "ViT")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": act}))
    with pytest.raises(UserError, match="hidden_act must be gelu"):
        read_weights(tmp_path)


def test_an_oblong_grid_is_refused_where_the_configuration_tells(tmp_path):
    save(tmp_path, "ViT")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_size": [16, 64]}))
    with pytest.raises(UserError, match="only square images"):
        read_weights(tmp_path)


def test_a_sharded_directory_is_read(tmp_path):
    model = save(tmp_path, "ViT", layer_norm_eps=1e-6)
    expected = read_weights(tmp_path).trunk
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file()
    assert_same(read_weights(tmp_path).trunk, expected)
    assert_same(read_weights(index, num_heads=3).trunk, expected)
    content = json.loads(index.read_text())
    for places in ({"a": "../a"}, {"a": 1}, [], {**content["weight_map"], "a": "no.safetensors"}):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError):
            read_weights(tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "{", "[]", "\xff"])
def test_a_configuration_that_is_no_json_object_is_one_line(tmp_path, text):
    save(tmp_path, "ViT")
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("num_attention_heads", value) for value in ([3], "3", 0, 5, 1e300, None, True)],
        *[("layer_norm_eps", value) for value in ([3], "3", -1, 1e300, None, float("nan"))],
    ],
)
def test_odd_numbers_in_a_configuration_are_one_line(tmp_path, key, value):
    save(tmp_path, "ViT")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match="heads|layer_norm_eps"):
        read_weights(tmp_path)


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
