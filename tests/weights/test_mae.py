"""Masked autoencoders from files of every kind, against transformers' and timm's models."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import msn
from msn.errors import UserError
from msn.evaluation.backbones import open_backbone
from msn.evaluation.features import FeatureSettings, Runtime
from msn.weights import load_backbone, read_weights
from msn.weights.export import export
from msn.weights.initialise import initialise
from tests.evaluation.toys import ToyImages
from tests.weights.builders import MODEL, images, shaken
from tests.weights.conftest import assert_same

DECODER = {"embed_dim": 16, "depth": 2, "num_heads": 4}


def make_mae(seed=0, decoder=DECODER, norm_pix_loss=True, mask_ratio=0.75, **changes):
    torch.manual_seed(seed)
    settings = {"decoder": decoder, "mask_ratio": mask_ratio, "norm_pix_loss": norm_pix_loss}
    return shaken(msn.MAE(model={**MODEL, **changes}, **settings), seed)


def released(mae):
    """A file as facebookresearch/mae writes it, with decoder."""
    states = {f"decoder_{name}": tensor for name, tensor in mae.decoder.state_dict().items()}
    states["mask_token"] = states.pop("decoder_mask_token")
    return {**mae.trunk.state_dict(), **states}


def save_checkpoint(path, mae, **more):
    """What training writes, as far as weights go."""
    states = {f"network.{name}": tensor for name, tensor in mae.state_dict().items()}
    method = {"decoder": DECODER, "mask_ratio": 0.5, "norm_pix_loss": mae.norm_pix_loss, "lr": 1e-3}
    header = {"format": 1, "kind": "mae", "model": mae.trunk.model_config, "method": method}
    path.parent.mkdir(parents=True, exist_ok=True)
    header |= {"epoch": 5, "init": None, "seed": 0, "licence": "Apache-2.0", **more}
    torch.save({"state_dict": states, "msn": header}, path)
    return path


def noise(count=2, patches=16):
    return torch.rand(count, patches, generator=torch.Generator().manual_seed(2))


def save_theirs(directory, decoder=True, **more):
    """A model of transformers, moved off its initial values, written by its save_pretrained."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{"intermediate_size": 96, "image_size": 32, "patch_size": 8},
        **{"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2},
        **{"decoder_num_attention_heads": 4, "decoder_intermediate_size": 64, **more},
    )
    torch.manual_seed(0)
    kind = transformers.ViTMAEForPreTraining if decoder else transformers.ViTMAEModel
    model = shaken(kind(config))
    model.save_pretrained(directory)
    return model


def test_our_checkpoint_and_its_run_give_the_same_network(tmp_path):
    mae = make_mae()
    path = save_checkpoint(tmp_path / "checkpoints" / "epoch-5-step-9.ckpt", mae)
    bare = tmp_path / "bare.pt"
    torch.save(mae.state_dict(), bare)
    for place in (path, tmp_path):
        found = msn.load_mae(place)
        assert_same(found.state_dict(), mae.state_dict())
        assert (found.num_kept, found.norm_pix_loss, found.training) == (8, True, False)
        assert (found.meta["epoch"], found.meta["licence"]) == (5, "Apache-2.0")
        assert found.transform(torch.zeros(3, 40, 40, dtype=torch.uint8)).shape == (3, 32, 32)
    weights = read_weights(path)
    assert (weights.source, weights.meta["kind"], weights.notes) == ("mae checkpoint", "mae", ())
    found = msn.load_mae(bare, num_heads=3, decoder=DECODER, norm_pix_loss=True)
    assert_same(found.state_dict(), mae.state_dict())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("names", ["5", "4", "5 in memory"])
def test_transformers_pretraining_model_gives_its_loss_and_prediction(
    tmp_path, names, norm_pix_loss, caplog
):
    model = save_theirs(tmp_path, norm_pix_loss=norm_pix_loss, mask_ratio=0.6)
    states = load_file(tmp_path / "model.safetensors")
    if names == "4":
        states = {
            k.replace("decoder_encoder.layer", "decoder_layers"): v for k, v in states.items()
        }
    if names == "5 in memory":
        states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(states, tmp_path / "model.safetensors", {"format": "pt"})
    mae = msn.load_mae(tmp_path)
    assert "assumed" not in caplog.text.replace("mean and std of ImageNet assumed", "")
    assert mae.trunk.norm.eps == mae.decoder.norm.eps == 1e-12
    mae, model = mae.double(), model.double()
    pixels = images(32).double()
    theirs = model(pixels, noise=noise())
    ours = mae(pixels, noise())
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours.prediction, theirs.logits, rtol=0, atol=1e-9)
    assert torch.equal(ours.mask, theirs.mask.double())


def test_a_decoder_that_is_loaded_is_not_told_as_ignored(tmp_path):
    save_theirs(tmp_path)
    rows = dict(initialise(msn.load_mae(tmp_path), read_weights(tmp_path)))
    assert rows["decoder"] == "loaded"
    assert "ignored" not in rows.values()


@pytest.mark.parametrize("source", ["ViTMAEModel", "mae_pretrain"])
def test_without_a_decoder_one_starts_anew_and_it_is_said(tmp_path, source, caplog):
    mae = make_mae()
    if source == "ViTMAEModel":
        model = save_theirs(tmp_path, decoder=False, mask_ratio=0.5)
        path, given, kept, targets = tmp_path, {}, 8, False
        expected = model.state_dict()["embeddings.cls_token"]
    else:
        path = tmp_path / "mae_pretrain_vit_small.pth"
        torch.save({"model": mae.trunk.state_dict()}, path)
        given, kept, targets = {"num_heads": 3, "decoder": DECODER}, 4, True
        expected = mae.trunk.cls_token
    torch.manual_seed(3)
    found = msn.load_mae(path, **given)
    assert (
        "holds no decoder: one is initialised (embed_dim 16, depth 2, num_heads 4)" in caplog.text
    )
    assert torch.equal(found.trunk.cls_token, expected)
    assert (found.num_kept, found.norm_pix_loss) == (kept, targets)
    assert not found.decoder.pred.bias.any()
    torch.manual_seed(3)
    assert_same(msn.load_mae(path, **given).state_dict(), found.state_dict())


def test_fixed_positions_tell_a_file_of_mae_without_decoder(tmp_path):
    """Its rows stand beside MAE's figures, its feature is MAE's, exports name it so."""
    path, trunk = tmp_path / "mae_pretrain_vit_small.pth", make_mae().trunk
    fresh = msn.MAE(model=MODEL, decoder=DECODER, mask_ratio=0.75, norm_pix_loss=True).trunk
    state = trunk.state_dict() | {"pos_embed": fresh.pos_embed}
    torch.save({"model": {name: tensor.half() for name, tensor in state.items()}}, path)
    found = msn.load_backbone(path, num_heads=3)
    assert (found.meta["kind"], found.native.feature) == ("mae", "class_token_norm")
    for other in (fresh.pos_embed.roll(8, dims=2), trunk.pos_embed):  # rows first, or learned
        torch.save({"model": state | {"pos_embed": other}}, path)
        found = msn.load_backbone(path, num_heads=3)
        assert ("kind" in found.meta, found.native.feature) == (False, "class_token")


def test_a_released_file_with_decoder_predicts_pixels_unless_it_says_more(tmp_path, caplog):
    mae = make_mae(decoder={"embed_dim": 512, "depth": 1, "num_heads": 16})
    path = tmp_path / "mae_visualize_vit_large.pth"
    torch.save({"model": released(mae)}, path)
    found = msn.load_mae(path, num_heads=3)
    assert_same(found.state_dict(), mae.state_dict())
    assert (found.norm_pix_loss, found.num_kept) == (False, 4)
    assert found.decoder.blocks[0].attn.num_heads == 16
    assert "attention heads of the decoder: 16 assumed" in caplog.text
    assert "norm_pix_loss: false assumed" in caplog.text
    arguments = argparse.Namespace(
        norm_pix_loss=True, mask_ratio=0.5, model="mae_vit_large_patch16"
    )
    torch.save({"model": released(mae), "args": arguments, "epoch": 3}, path)
    caplog.clear()
    found = msn.load_mae(path, num_heads=3)
    assert (found.norm_pix_loss, found.num_kept) == (True, 8)
    assert "norm_pix_loss" not in caplog.text
    # What a person says wins over what is assumed or recorded.
    found = msn.load_mae(path, num_heads=3, norm_pix_loss=False, mask_ratio=0.25)
    assert (found.norm_pix_loss, found.num_kept) == (False, 12)


def finetuned(mae):
    states = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: tensor
        for name, tensor in mae.trunk.state_dict().items()
    }
    return {**states, "head.weight": torch.ones(5, 24), "head.bias": torch.zeros(5)}


def test_a_fine_tuned_file_gives_the_mean_of_patches_through_fc_norm(tmp_path, caplog):
    states = finetuned(make_mae())
    path = tmp_path / "mae_finetuned_vit_base.pth"
    torch.save({"model": states}, path)
    backbone = load_backbone(path, num_heads=3)
    assert "its feature is the mean of patch tokens through fc_norm" in caplog.text
    other = timm.models.VisionTransformer(
        **MODEL, num_classes=5, global_pool="avg", fc_norm=True
    ).eval()
    other.load_state_dict(states)
    with torch.no_grad():
        tokens = other.forward_features(images(32))
        expected = other.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(backbone(images(32)), expected, rtol=0, atol=1e-5)
    opened = open_backbone("mae", str(path), image_size=None, num_heads=3)
    settings = FeatureSettings(feature="class_token", image_size=None, batch_size=2, precision="32")
    assert opened.kind(settings) == "patch_mean_norm"
    found = opened.features(ToyImages(2), settings, Runtime((torch.device("cpu"),)), "toys").rows
    pixels = torch.stack([backbone.transform(ToyImages(2)[i]) for i in range(6)])
    torch.testing.assert_close(found, backbone(pixels).detach(), rtol=0, atol=1e-5)
    assert set(read_weights(path, num_heads=3).ignored) == {"head.weight", "head.bias"}
    with pytest.raises(UserError, match=r"fine-tuned to classify: it has fc_norm"):
        msn.load_mae(path, num_heads=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_embed.weight": None}, "decoder_embed.weight is missing"),
        ({"decoder_pred.weight": None}, "pred.weight is missing"),
        ({"mask_token": None}, "mask_token is missing"),
        ({"decoder_blocks.1.norm1.bias": None}, r"blocks\.1\.norm1\.bias is missing"),
        ({"decoder_norm.weight": torch.ones(7)}, r"norm.weight is \[7\] instead of \[16\]"),
        ({"decoder_embed.bias": torch.full((16,), torch.nan)}, "embed.bias holds NaN"),
    ],
)
def test_a_decoder_that_is_not_whole_is_refused_by_name(tmp_path, change, message):
    states = released(make_mae()) | change
    states = {name: tensor for name, tensor in states.items() if tensor is not None}
    torch.save({"model": states}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message) as error:
        msn.load_mae(tmp_path / "a.pth", num_heads=3, decoder=DECODER)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"width 16 is not the paper's: give decoder=\{'num_heads': N\}"),
        ({"decoder": {"num_heads": 3}}, "multiple of 4 and of num_heads=3"),
        ({"decoder": {**DECODER, "depth": 8}}, "depth is 2, not 8"),
        ({"decoder": DECODER, "mask_ratio": 1.5}, r"mask_ratio must be in \(0, 1\)"),
    ],
)
def test_numbers_that_do_not_fit_the_file_are_refused(tmp_path, given, message):
    torch.save({"model": released(make_mae())}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        msn.load_mae(tmp_path / "a.pth", num_heads=3, **given)


@pytest.mark.parametrize("name", ["mask_ratio", "norm_pix_loss", "decoder_num_attention_heads"])
def test_a_configuration_with_a_wrong_value_is_refused(tmp_path, name):
    save_theirs(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: "many"}))
    with pytest.raises(UserError, match=name.replace("decoder_num_attention", "num")):
        msn.load_mae(tmp_path)


def test_msn_weights_give_a_trunk_to_reconstruct_with(tmp_path, caplog):
    from tests.weights.builders import make_network, save_checkpoint

    network = make_network()
    save_checkpoint(tmp_path / "a.ckpt", network)
    found = msn.load_mae(tmp_path / "a.ckpt", decoder=DECODER)
    assert_same(found.trunk.state_dict(), network.target.trunk.state_dict())
    assert "holds no decoder" in caplog.text


def write(source, out, format="huggingface", **more):
    settings = {"image_size": None, "head": None, "overwrite": False, "lowshot": None, **more}
    return export(read_weights(source), format=format, out=out, **settings)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_our_export_is_transformers_pretraining_model_and_reads_back_bit_equal(
    tmp_path, norm_pix_loss
):
    transformers = pytest.importorskip("transformers")
    mae = make_mae(norm_pix_loss=norm_pix_loss)
    report = write(save_checkpoint(tmp_path / "a.ckpt", mae), tmp_path / "out")
    assert report["max_abs_difference"] < 1e-5
    assert report["reconstruction"]["max_abs_difference"] < 1e-5
    assert report["reconstruction"]["loss_abs_difference"] < 1e-5
    assert {row["image_size"] for row in report["comparisons"]} == {32, 8}
    again = msn.load_mae(tmp_path / "out")
    assert_same(again.state_dict(), mae.state_dict())
    assert (again.norm_pix_loss, again.num_kept) == (norm_pix_loss, 8)
    assert again.meta["licence"] == "Apache-2.0"
    assert transformers.ViTImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 32
    model = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "ViTMAEForPreTraining"
    # transformers goes on from it, and so do we from what it saves.
    model, ours = model.double().train(), make_mae_of(tmp_path / "out").double()
    theirs = model(images(32).double(), noise=noise())
    found = ours(images(32).double(), noise())
    torch.testing.assert_close(found.loss, theirs.loss, rtol=1e-10, atol=0)
    theirs.loss.backward()
    found.loss.backward()
    # The first layer of the decoder: its gradient has passed through all others.
    gradient = model.decoder.decoder_embed.weight.grad
    torch.testing.assert_close(ours.decoder.embed.weight.grad, gradient, atol=1e-8, rtol=0)
    model.float().save_pretrained(tmp_path / "again")
    again = msn.load_mae(tmp_path / "again")
    assert_same(again.state_dict(), mae.state_dict())
    assert (again.norm_pix_loss, again.meta["licence"]) == (norm_pix_loss, "Apache-2.0")


def make_mae_of(path):
    return msn.load_mae(path).train()


def test_encoder_exports_are_what_their_libraries_call_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    mae = make_mae()
    source = save_checkpoint(tmp_path / "a.ckpt", mae)
    with torch.no_grad():
        expected = mae.encode(images(32), None)
    write(source, tmp_path / "vit", model_type="vit")
    model = transformers.AutoModel.from_pretrained(tmp_path / "vit").eval()
    assert type(model).__name__ == "ViTModel"
    with torch.no_grad():
        found = model(images(32)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for format in ("timm", "torch"):
        write(source, tmp_path / format, format)
        again = read_weights(tmp_path / format)
        assert_same(again.trunk, mae.trunk.state_dict())
        assert (again.meta["kind"], again.decoder) == ("mae", None)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == "mae"


@pytest.mark.parametrize(
    ("format", "settings", "message"),
    [
        ("timm", {"model_type": "vit"}, "model_type needs format=huggingface"),
        ("huggingface", {"model_type": "bert"}, "must be one of vit_msn, vit_mae, vit"),
        ("huggingface", {"image_size": 64}, "the decoder is for 32 px; model_type=vit"),
    ],
)
def test_exports_that_cannot_be_are_refused(tmp_path, format, settings, message):
    source = save_checkpoint(tmp_path / "a.ckpt", make_mae())
    with pytest.raises(UserError, match=message):
        write(source, tmp_path / "out", format, **settings)
    assert not (tmp_path / "out").exists()


def test_a_decoder_is_needed_for_what_has_one_and_a_pooled_feature_cannot_be_said(tmp_path):
    pytest.importorskip("transformers")
    torch.save(make_mae(embed_dim=192).trunk.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="hold no decoder; model_type=vit"):
        write(tmp_path / "a.pth", tmp_path / "out", model_type="vit_mae")
    torch.save({"model": finetuned(make_mae(embed_dim=192))}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="format=timm: cannot express .* format=torch can"):
        write(tmp_path / "b.pth", tmp_path / "out", "timm")
    write(tmp_path / "b.pth", tmp_path / "out", "torch")
    expected = load_backbone(tmp_path / "b.pth")(images(32))
    assert torch.equal(load_backbone(tmp_path / "out")(images(32)), expected)


@pytest.mark.slow
def test_transformers_trainer_goes_on_from_our_export_and_we_from_what_it_saves(tmp_path):
    """As transformers' `run_mae.py` does, in two steps on images that we made."""
    transformers = pytest.importorskip("transformers")
    mae = make_mae()
    write(save_checkpoint(tmp_path / "a.ckpt", mae), tmp_path / "out")
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "out")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8, generator=generator)
    rows = processor(list(pixels), return_tensors="pt")["pixel_values"]
    assert rows.shape == (16, 3, 32, 32)
    model = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out")
    arguments = transformers.TrainingArguments(
        **{"output_dir": str(tmp_path / "trained"), "max_steps": 2, "use_cpu": True},
        **{"per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": []},
        **{"remove_unused_columns": False, "label_names": ["pixel_values"]},
    )
    data = [{"pixel_values": row} for row in rows]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    result = trainer.train()
    trainer.save_model()
    assert result.global_step == 2
    again = msn.load_mae(tmp_path / "trained")
    assert not torch.equal(again.decoder.pred.weight, mae.decoder.pred.weight)
    with torch.no_grad():
        theirs = model.eval()(rows, noise=noise(16))
        ours = again(rows, noise(16))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    # The decoder is thrown away, and only the classifier is new.
    classifier, info = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "out", num_labels=5, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert all(key.startswith("decoder.") for key in info["unexpected_keys"])
    with torch.no_grad():
        found = classifier.eval()(rows, output_hidden_states=True).hidden_states[-1]
        expected = mae.trunk.forward_features(rows, norm=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
