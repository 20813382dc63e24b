import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import msn
from msn.errors import UserError
from msn.evaluation.backbones import open_backbone, open_backbones
from msn.files import write_checkpoint
from msn.weights import build_trunk, read_weights, save_backbone
from msn.weights.weights import EXACT_GELU
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
    assert weights.notes == ()
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
    assert assumed.model["num_heads"] == 3
    assert "attention heads: 3 assumed (DeiT-Ti" in assumed.notes[0]
    told = read_weights(tmp_path / "a.pth", num_heads=6)
    assert (told.model["num_heads"], told.notes) == (6, (EXACT_GELU,))
    save_run(tmp_path, trunk)
    assert read_weights(tmp_path, num_heads=6).model["num_heads"] == 3


def test_a_guess_of_heads_is_said_where_features_are_made_with_it(tmp_path, caplog):
    torch.save(make_trunk(embed_dim=192).state_dict(), tmp_path / "a.pth")
    msn.load_backbone(tmp_path / "a.pth", num_heads=3)
    open_backbone("a", str(tmp_path / "a.pth"), image_size=None, num_heads=3)
    assert "assumed (" not in caplog.text
    msn.load_backbone(tmp_path / "a.pth")
    open_backbone("a", str(tmp_path / "a.pth"), image_size=None, num_heads=None)
    assert caplog.text.count("3 assumed (DeiT-Ti, arXiv 2012.12877, Table 1)") == 2


@pytest.mark.filterwarnings("error")
def test_a_state_dict_of_parameters_is_read_without_a_warning(tmp_path):
    torch.save(make_trunk().state_dict(keep_vars=True), tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth", num_heads=3).trunk["pos_embed"].ndim == 3


def test_heads_against_a_file_s_own_word_are_refused(tmp_path):
    trunk = make_trunk()
    save_run(tmp_path / "told", trunk)
    torch.save(trunk.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="model.num_heads=1: .*told itself says 3 attention heads"):
        msn.load_backbone(tmp_path / "told", num_heads=1)
    with pytest.raises(UserError, match="model.num_heads=1: checkpoint itself says 3 attention"):
        open_backbones(str(tmp_path / "told"), image_size=None, num_heads=1)
    both = [f"a:{tmp_path / 'told'}", f"b:{tmp_path / 'a.pth'}"]
    opened = open_backbones(both, image_size=None, num_heads=1)  # for the one that cannot tell
    assert [one.trunk.num_heads for one in opened] == [3, 1]


def test_exact_gelu_is_said_where_nothing_tells_the_activation(tmp_path, caplog):
    trunk = make_trunk(embed_dim=192, depth=12, patch_size=16)
    torch.save(trunk.state_dict(), tmp_path / "a.pth")
    save_run(tmp_path / "told", trunk)
    msn.load_backbone(tmp_path / "told")
    open_backbones(
        f"timm/vit_tiny_patch16_224@{tmp_path / 'a.pth'}", image_size=None, num_heads=None
    )
    assert caplog.text == ""
    msn.load_backbone(tmp_path / "a.pth", num_heads=3)
    assert caplog.text.count("activation: exact GELU assumed") == 1


@pytest.mark.parametrize("width", [24, 96, 512])
def test_heads_of_an_unusual_width_are_not_guessed(tmp_path, width):
    torch.save(make_trunk(embed_dim=width, num_heads=4).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"width {width} is not usual: give model.num_heads"):
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
        f"blocks.{i}.{name}.gamma": torch.ones(24) for i in range(6) for name in ("ls8", "ls9")
    }
    del states["norm.weight"]
    states["norm.bias"] = torch.zeros(7)
    torch.save(states, tmp_path / "a.pth")
    with pytest.raises(UserError, match="another architecture") as error:
        read_weights(tmp_path / "a.pth")
    message = str(error.value)
    assert "norm.weight is missing" in message
    assert "norm.bias is [7] instead of [24]" in message
    assert "blocks.0.ls9.gamma [24] is not expected" in message
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


def bare(path, content=None, **changes):
    """A file that tells nothing but names and shapes."""
    torch.save(make_trunk(**changes).state_dict() if content is None else content, path)
    return path


@pytest.mark.parametrize(("width", "heads"), [(1280, 16), (1408, 16)])
def test_heads_of_a_published_width_are_those_of_the_publication(tmp_path, width, heads):
    weights = read_weights(
        bare(tmp_path / "a.pth", embed_dim=width, depth=1, num_heads=1, mlp_ratio=0.1)
    )
    assert weights.model["num_heads"] == heads
    assert f"attention heads: {heads} assumed (ViT-" in weights.notes[0]


def moco_positions(side, width):
    """By a loop: sines and cosines of the row, then of the column; zeros for the class token."""
    rows = [[0.0] * width]
    for row in range(side):
        for column in range(side):
            parts = []
            for place in (row, column):
                for wave in (math.sin, math.cos):
                    parts += [wave(place / 10000 ** (4 * i / width)) for i in range(width // 4)]
            rows.append(parts)
    return torch.tensor([rows])


def test_a_width_with_two_numbers_of_heads_needs_a_word_or_the_positions_of_moco(tmp_path):
    path = bare(tmp_path / "a.pth", embed_dim=384)
    with pytest.raises(UserError, match=r"6 \(DeiT-S.* or 12 \(MoCo v3.*give model.num_heads"):
        read_weights(path)
    assert read_weights(path, num_heads=6).model["num_heads"] == 6
    states = make_trunk(embed_dim=384, num_heads=12).state_dict()
    states["pos_embed"] = moco_positions(4, 384)
    assert read_weights(bare(path, states)).model["num_heads"] == 12
    # MAE's begin with the column: they tell nothing of heads.
    patches = states["pos_embed"][:, 1:].unflatten(1, (4, 4)).mT.transpose(-1, -2)
    states["pos_embed"][:, 1:] = patches.transpose(1, 2).flatten(1, 2)
    with pytest.raises(UserError, match=r"give model.num_heads"):
        read_weights(bare(path, states))


def test_the_layout_of_the_reference_has_heads_of_64(tmp_path):
    states = {
        f"module.{k}": v for k, v in make_trunk(embed_dim=128, num_heads=2).state_dict().items()
    }
    weights = read_weights(bare(tmp_path / "a.pth.tar", {"target_encoder": states}))
    assert weights.model["num_heads"] == 2


@pytest.mark.parametrize("first", ["state_dict", "model"])
@pytest.mark.parametrize("second", ["state_dict_ema", "model_ema"])
def test_of_two_halves_a_key_chooses(tmp_path, first, second):
    plain, averaged = make_trunk().state_dict(), make_trunk(1).state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in averaged.items()}
    path = bare(tmp_path / "a.pth", {first: plain, second: wrapped, "epoch": 3})
    with pytest.raises(UserError, match=rf"{second}\.module.*: init_key=NAME chooses") as error:
        read_weights(path, num_heads=3)
    assert f"{first}," in str(error.value) or f", {first}:" in str(error.value)
    chosen = read_weights(path, num_heads=3, key=second)
    assert_same(chosen.trunk, averaged)
    assert chosen.notes == (f"weights taken from {second}.module", EXACT_GELU)
    assert_same(read_weights(path, num_heads=3, key=first).trunk, plain)
    with pytest.raises(UserError, match="init_key=teacher must be one of"):
        read_weights(path, num_heads=3, key="teacher")
    assert_same(msn.load_backbone(path, num_heads=3, key=second).state_dict(), averaged)
    for keys in (second, {"a": second}):
        (opened,) = open_backbones([f"a:{path}"], image_size=None, num_heads=3, key=keys)
        assert_same(opened.trunk.state_dict(), averaged)
    with pytest.raises(UserError, match="init_key: no backbone is called b"):
        open_backbones([f"a:{path}"], image_size=None, num_heads=3, key={"b": second})


def test_a_key_reaches_every_trunk_of_files_that_need_none(tmp_path):
    network = make_network()
    path = save_checkpoint(tmp_path / "a.ckpt", network)
    anchor = read_weights(path, key="state_dict.network.anchor.trunk")
    assert_same(anchor.trunk, network.anchor.trunk.state_dict())
    assert anchor.model == MODEL
    layout = released_layout("default")
    path = bare(tmp_path / "a.pth.tar", layout)
    expected = read_weights(path, num_heads=2).anchor_trunk
    assert_same(read_weights(path, num_heads=2, key="encoder").trunk, expected)


@pytest.mark.parametrize(
    "prefix",
    ["model.", "backbone.", "encoder.", "ema.", "student.", "module.backbone.", "net.", "vit."]
    + ["trunk.", "_orig_mod.module.", "deit.", "a.b.c."],
)
@pytest.mark.parametrize("wrapper", [None, "teacher", "model_state_dict"])
def test_prefixes_and_wrappers_are_taken_off_and_said(tmp_path, prefix, wrapper):
    states = make_trunk().state_dict()
    content = {prefix + name: tensor for name, tensor in states.items()}
    content["head_of_theirs.weight"] = torch.ones(2)
    content["n_averaged"] = torch.tensor(3)
    content = content if wrapper is None else {wrapper: content, "optimizer": {"state": {0: 1}}}
    weights = read_weights(bare(tmp_path / "a.pth", content), num_heads=3)
    assert_same(weights.trunk, states)
    assert set(weights.ignored) == {"head_of_theirs.weight", "n_averaged"}
    name = ".".join(part for part in (wrapper, prefix.rstrip(".")) if part)
    assert weights.notes == (f"weights taken from {name}", EXACT_GELU)


def test_the_average_that_torch_makes_is_read(tmp_path):
    trunk = make_trunk()
    averaged = torch.optim.swa_utils.AveragedModel(trunk)
    path = bare(tmp_path / "a.pth", averaged.state_dict())
    assert_same(read_weights(path, num_heads=3).trunk, trunk.state_dict())


def test_dictionaries_that_hold_themselves_end(tmp_path):
    content = {"model": make_trunk().state_dict()}
    content["again"] = content
    assert read_weights(bare(tmp_path / "a.pth", content), num_heads=3).model == MODEL


def positions(rows, columns, width=24):
    """Smooth over a grid, as learned ones are, with a little noise."""
    angles = torch.arange(1, width // 4 + 1) * 0.3
    row, column = torch.arange(rows)[:, None] * angles, torch.arange(columns)[:, None] * angles
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(rows, columns, -1)
    column = torch.cat([column.sin(), column.cos()], 1)[None].expand(rows, columns, -1)
    grid = torch.cat([row, column], -1).flatten(0, 1)
    noise = torch.randn(grid.shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.ones(1, width), grid + 0.1 * noise])[None]


@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (16, 4), (2, 32), (7, 28), (28, 7)])
def test_positions_of_an_oblong_grid_are_refused(tmp_path, rows, columns):
    states = {**make_trunk().state_dict(), "pos_embed": positions(rows, columns)}
    with pytest.raises(UserError, match=f"those of {rows} x {columns} patches; only square"):
        read_weights(bare(tmp_path / "a.pth", states), num_heads=3)


def test_a_file_of_ours_is_never_taken_for_an_oblong_grid(tmp_path):
    states = {**make_trunk().state_dict(), "pos_embed": positions(2, 32)}
    told = {**MODEL, "img_size": 8 * MODEL["patch_size"]}
    save_backbone(tmp_path / "backbone.safetensors", states, {"model": told})
    assert read_weights(tmp_path / "backbone.safetensors").model == told


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 14, 24])
def test_positions_of_a_square_grid_are_read_whether_they_show_it_or_not(tmp_path, side):
    for pos_embed in (positions(side, side), moco_positions(side, 24)):
        states = {**make_trunk().state_dict(), "pos_embed": pos_embed}
        weights = read_weights(bare(tmp_path / "a.pth", states), num_heads=3)
        assert weights.model["img_size"] == side * 8
    for seed in range(10):
        make = torch.Generator().manual_seed(seed)
        states["pos_embed"] = torch.randn(1, 1 + side * side, 24, generator=make)
        read_weights(bare(tmp_path / "a.pth", states), num_heads=3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["blocks.1.norm2.bias", "pos_embed"])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, name, value):
    network = make_network()
    network.target.trunk.state_dict()[name].view(-1)[3] = value
    for path in (
        save_checkpoint(tmp_path / "a.ckpt", network),
        bare(tmp_path / "a.pth", network.target.trunk.state_dict()),
        save_run(tmp_path / "run", network.target.trunk),
    ):
        with pytest.raises(UserError, match=rf"{name} holds NaN or infinity"):
            read_weights(path, num_heads=3)


@pytest.mark.parametrize("part", ["prototypes", "target.head.fc1.weight", "anchor.trunk.cls_token"])
def test_every_part_of_a_checkpoint_is_looked_at(tmp_path, part):
    network = make_network()
    network.state_dict()[part].view(-1)[0] = math.nan
    with pytest.raises(UserError, match="holds NaN or infinity"):
        read_weights(save_checkpoint(tmp_path / "a.ckpt", network))


def test_doubles_too_large_for_single_precision_are_not_finite(tmp_path):
    states = make_trunk().double().state_dict()
    states["norm.bias"][0] = 1e300
    with pytest.raises(UserError, match=r"norm\.bias holds NaN or infinity"):
        read_weights(bare(tmp_path / "a.pth", states), num_heads=3)


def test_weights_in_double_precision_make_features_in_single(tmp_path):
    states = make_trunk().double().state_dict()
    backbone = msn.load_backbone(bare(tmp_path / "a.pth", states), num_heads=3)
    image = backbone.transform(Image.new("RGB", (40, 40)))
    assert backbone(image[None]).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        *[(kind, r"norm\.bias is \w+, not float") for kind in ("int8", "int64", "bool")],
        *[(kind, r"norm\.bias is \w+, not float") for kind in ("complex64", "float8_e4m3fn")],
        ("sparse", "holds a sparse tensor; only dense"),
        ("meta", "holds a meta tensor"),
        ("quantised", "holds a qtensor; only dense"),
        ("number", r"norm\.bias is \[\] instead of \[24\]"),
        ("expanded", r"a tensor of shape \[24\] repeats the 1 numbers"),
        ("list", r"norm\.bias is missing"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_weights_are_one_line(tmp_path, kind, said):
    states = make_trunk().state_dict()
    bias = states["norm.bias"]
    states["norm.bias"] = {
        "sparse": bias.to_sparse,
        "meta": lambda: bias.to("meta"),
        "quantised": lambda: torch.quantize_per_tensor(bias, 0.1, 0, torch.qint8),
        "number": lambda: torch.tensor(1.0),
        "expanded": lambda: torch.ones(1).expand(24),
        "list": lambda: [1.0] * 24,
    }.get(kind, lambda: bias.to(getattr(torch, kind)))()
    with pytest.raises(UserError, match=said):
        read_weights(bare(tmp_path / "a.pth", states), num_heads=3)


def test_a_whole_file_of_integers_in_hugging_faces_names_is_one_line(tmp_path):
    from msn.weights.huggingface import to_huggingface

    states = to_huggingface(make_trunk().state_dict())
    for made in ({n: t.to(torch.int8) for n, t in states.items()}, dict.fromkeys(states, bias0())):
        with pytest.raises(UserError, match="int8|another architecture"):
            read_weights(bare(tmp_path / "a.pth", made), num_heads=3)


def bias0():
    return torch.tensor(1.0)


def test_what_others_keep_beside_their_weights_is_read(tmp_path):
    states = make_trunk().state_dict()
    beside = {"args": argparse.Namespace(lr=1.0, name="x", sizes=[1, 2]), "best": np.float64(1.5)}
    beside |= {"epoch": np.int64(3), "done": np.bool_(True), "scaler": {"scale": np.float32(2)}}
    weights = read_weights(bare(tmp_path / "a.pth", {"model": states, **beside}), num_heads=3)
    assert_same(weights.trunk, states)


def test_thousands_of_blocks_are_counted_not_built(tmp_path):
    states = make_trunk(embed_dim=1, num_heads=1, depth=1, mlp_ratio=1).state_dict()
    block = {n.removeprefix("blocks.0."): t for n, t in states.items() if n.startswith("blocks.")}
    small = {f"blocks.{i}.{n}": t for i in range(1001) for n, t in block.items()}
    start = time.monotonic()
    with pytest.raises(UserError, match="1001 blocks; at most 1000"):
        read_weights(bare(tmp_path / "a.pth", {**states, **small}), num_heads=1)
    names = {f"blocks.{i}.x": torch.ones(1) for i in range(1001)}
    with pytest.raises(UserError, match="1001 blocks; at most 1000"):
        read_weights(bare(tmp_path / "a.pth", {**states, **names}), num_heads=1)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["backbone.safetensors", "epoch-1-step-3.ckpt", "a.pth"])
def test_one_flipped_bit_is_refused_wherever_it_is(tmp_path, name):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_run(tmp_path, make_trunk())
    elif name.endswith("ckpt"):
        write_checkpoint(path, torch.load(save_checkpoint(tmp_path / "b", make_network())))
    else:
        bare(path)
    whole = path.read_bytes()
    expected = read_weights(path, num_heads=3)
    for place in range(3, len(whole), len(whole) // 97):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            found = read_weights(path, num_heads=3)
        except UserError:
            continue
        assert_same(found.trunk, expected.trunk)  # beside what is read, as a member's time
        assert found.model == expected.model


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, caplog):
    for seed, name in ((1, "epoch-1-step-3.ckpt"), (2, "epoch-2-step-6.ckpt")):
        made = save_checkpoint(tmp_path / "b", make_network(seed))
        write_checkpoint(tmp_path / "checkpoints" / name, torch.load(made))
    newest = tmp_path / "checkpoints" / name
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    os.mkfifo(tmp_path / "checkpoints" / "epoch-3-step-9.ckpt")
    assert_same(read_weights(tmp_path).trunk, make_network(1).target.trunk.state_dict())
    assert "epoch-2-step-6.ckpt is damaged (its checksum does not match)" in caplog.text
    assert "epoch-3-step-9.ckpt is damaged (not a regular file)" in caplog.text
    with pytest.raises(UserError, match="its checksum does not match"):
        read_weights(newest)


@pytest.mark.parametrize(
    "header",
    ["[" * 200_000, '{"a":' * 200_000 + "1" + "}" * 200_000]
    + [json.dumps({"std": [0.0] * 3}), json.dumps({"mean": [10**400] * 3})]
    + [json.dumps({"licence": ["x"]}), json.dumps({"norm": {"weight": [[1], [1, 2]]}})],
)
def test_an_odd_header_is_one_line(tmp_path, header):
    save_file(make_trunk().state_dict(), tmp_path / "a.safetensors", {"msn": header})
    with pytest.raises(UserError, match="header"):
        read_weights(tmp_path / "a.safetensors", num_heads=3)


def test_a_header_that_grows_when_it_is_written_out_is_refused(tmp_path):
    laughter = ["ha"]
    for _ in range(40):
        laughter = [laughter] * 10
    content = {"state_dict": {}, "msn": {"mean": laughter}}
    with pytest.raises(UserError, match="damaged header"):
        read_weights(bare(tmp_path / "a.pth", content))


@pytest.mark.parametrize(
    "content",
    [
        {"target_encoder": {0: 1, "a": 2}},
        {"target_encoder": {"module.fc.a": torch.ones(1)}, "encoder": {1: 2}},
        {"state_dict": {"network.target.trunk.cls_token": 3}},
        {"state_dict": {"network.target.trunk.cls_token": torch.tensor(3), 1: 2}},
    ],
)
def test_broken_layouts_of_known_kinds_are_one_line(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.pth"):
        read_weights(bare(tmp_path / "a.pth", content))
