import dataclasses
import errno
import json
import os
import resource
import signal

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from msn.commands import export as command
from msn.commands.entry import compose
from msn.errors import UserError
from msn.weights import build_trunk, load_backbone, read_weights
from msn.weights.classifier import Classifier
from msn.weights.export import FORMATS, export, official_layout
from msn.weights.huggingface import preprocessor_config
from msn.weights.parity import fixed_images
from msn.weights.released import split_encoder
from msn.weights.weights import short_side, trunk_digest
from tests.weights.builders import make_network, released_layout, save_checkpoint, save_run
from tests.weights.conftest import assert_same, make_weights


def run(weights, out, format="timm", **more):
    settings = {"image_size": None, "head": None, "overwrite": False, "lowshot": None, **more}
    return export(weights, format=format, out=out, **settings)


def needs(format):
    for package in FORMATS[format].needs:
        pytest.importorskip(package)


@pytest.mark.parametrize(
    ("format", "model"),
    [(format, "patch4") for format in FORMATS if format != "onnx"]
    + [pytest.param("onnx", "patch4", marks=pytest.mark.slow)]
    + [(format, "patch7") for format in ("timm", "huggingface", "official", "torch")]
    + [
        pytest.param(format, size, marks=pytest.mark.slow)
        for format in ("timm", "huggingface")
        for size in ("s16", "s16_96px")
    ],
)
def test_export_reads_back_bit_equal_and_computes_the_same_elsewhere(format, model, tmp_path):
    needs(format)
    weights = make_weights(model)
    out = tmp_path / os.fsdecode(b"\xe9.out")  # Rust and C++ refuse such a name
    report = run(weights, out, format)
    again = read_weights(out, num_heads=weights.model["num_heads"])
    assert_same(again.trunk, weights.trunk)
    assert again.model == weights.model
    assert again.meta["licence"] == "Apache-2.0"
    assert report["max_abs_difference"] < 1e-5
    stored = json.loads((out / "parity.json").read_text())
    assert stored == report
    assert "apache-2.0" in (out / "README.md").read_text()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_weights_are_bit_equal_after_a_journey_through_every_format(tmp_path):
    for format in FORMATS:
        needs(format)
    start = weights = make_weights("patch7")
    for format in FORMATS:
        run(weights, tmp_path / format, format)
        weights = read_weights(tmp_path / format)
    assert_same(weights.trunk, start.trunk)
    assert weights.model == start.model
    assert weights.meta["epoch"] == 3


@pytest.mark.slow
def test_timm_loads_the_directory_at_another_size_and_gives_our_features(tmp_path):
    weights = make_weights("s16")
    run(weights, tmp_path / "out", image_size=96)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = fixed_images(96)
    with torch.no_grad():
        ours = build_trunk(weights).forward_features(images, norm=True)
        torch.testing.assert_close(model.forward_features(images), ours, atol=1e-5, rtol=0)
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 96, 96)
    assert config["crop_pct"] == 96 / 110  # 96 * 256 / 224 px, rounded as Resize wants it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_runs_the_export_in_half_precision_with_sdpa(dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = make_weights("patch7")
    report = run(weights, tmp_path / "out", "huggingface")
    model = transformers.AutoModel.from_pretrained(
        tmp_path / "out", dtype=dtype, attn_implementation="sdpa"
    ).eval()
    assert type(model).__name__ == "ViTMSNModel"
    with torch.no_grad():
        found = model(fixed_images(28).to(dtype)).last_hidden_state
        ours = build_trunk(weights).forward_features(fixed_images(28), norm=True)
    stated = report["half_precision"][str(dtype).removeprefix("torch.")]["max_abs_difference"]
    assert found.dtype is dtype
    assert (found.float() - ours).abs().max() <= stated + 1e-5


def test_hugging_face_parity_covers_both_attentions_and_a_second_size(tmp_path):
    pytest.importorskip("transformers")
    report = run(make_weights("patch7"), tmp_path / "out", "huggingface")
    found = {(row["variant"], row["image_size"]) for row in report["comparisons"]}
    assert found == {(kind, size) for kind in ("sdpa", "eager") for size in (28, 7)}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "width"), [(32, 427), (96, 517), (224, 512), (448, 512)])
def test_auto_image_processor_prepares_images_as_we_do(size, width, tmp_path):
    transformers = pytest.importorskip("transformers")
    run(make_weights("s16"), tmp_path / "out", "huggingface", image_size=size)
    transform = load_backbone(tmp_path / "out").transform
    # 427 x 512 becomes 256 x 306: where the margin is odd, transformers crops one pixel aside.
    photos = [Image.fromarray(photo[:, :width]) for photo in load_sample_images().images]
    # transformers 5 or 4; by Pillow to the bit, else resized pixels are one step of 255 apart.
    new = int(transformers.__version__.split(".")[0]) >= 5
    ways = [{"backend": "pil"}, {"backend": "torchvision"}] if new else [{}, {"use_fast": True}]
    for way, steps in zip(ways, (0.01, 1.5), strict=True):
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", **way)
        for photo in photos:
            found = processor(photo, return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(
                found, transform(photo), atol=steps / 255 / 0.224, rtol=0, msg=str(way)
            )


def test_enlarged_position_embeddings_read_back(tmp_path):
    run(make_weights("s16", depth=1), tmp_path / "out", "torch", image_size=448)
    assert read_weights(tmp_path / "out").model["img_size"] == 448


def test_hugging_face_scripts_that_crop_to_size_fit_the_model():
    for size in range(8, 1024):
        config = preprocessor_config(size, mean=(0.5,) * 3, std=(0.5,) * 3)
        assert config["size"]["shortest_edge"] == config["crop_size"]["height"] == size
        # As PoolFormerImageProcessor computes it.
        assert int(config["size"]["shortest_edge"] / config["crop_pct"]) == short_side(size)


def test_auto_model_reads_the_timm_export_and_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = make_weights("patch7")
    run(weights, tmp_path / "out", "timm")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    images = fixed_images(28)
    with torch.no_grad():
        found = model(images).last_hidden_state
        ours = build_trunk(weights).forward_features(images, norm=True)
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["timm", "huggingface"])
def test_feature_pipelines_run_on_exports(format, tmp_path):
    transformers = pytest.importorskip("transformers")
    run(make_weights("s16"), tmp_path / "out", format)
    pipeline = transformers.pipeline("image-feature-extraction", model=str(tmp_path / "out"))
    photo = Image.fromarray(load_sample_images().images[0])
    assert torch.tensor(pipeline([photo, photo.convert("L")])).shape == (2, 1, 197, 384)


@pytest.mark.parametrize(("format", "extra"), [("huggingface", "hf"), ("onnx", "onnx")])
def test_missing_extras_are_named_as_this_package_is(format, extra, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'msn-pretraining\[{extra}\]'"):
        run(weights, tmp_path / "out", format)
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'msn-pretraining\[onnx\]'"):
        read_weights(tmp_path / "a.onnx")


def test_a_failed_comparison_leaves_nothing(weights, tmp_path, monkeypatch):
    good = FORMATS["timm"]

    def write(content, directory):
        trunk = dict(content.weights.trunk)
        trunk["norm.bias"] = trunk["norm.bias"] + 1e-3
        wrong = content._replace(weights=make_weights())
        wrong.weights.trunk.update(trunk)
        good.write(wrong, directory)

    monkeypatch.setitem(FORMATS, "timm", good._replace(write=write))
    with pytest.raises(UserError, match="parity with timm .* failed"):
        run(weights, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_existing_out_is_kept_unless_overwrite_and_only_exports_are_replaced(weights, tmp_path):
    out = tmp_path / "out"
    run(weights, out)
    with pytest.raises(UserError, match="overwrite=true"):
        run(weights, out)
    run(weights, out, "torch", overwrite=True)
    assert not (out / "config.json").exists()
    assert (out / "backbone.pth").exists()
    (out / "precious").mkdir()
    with pytest.raises(UserError, match="not an export"):
        run(weights, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_no_export_has_written_are_not_replaced(weights, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not an export"):
        run(weights, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    run(weights, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "parity.json").is_file()


def test_a_full_disk_leaves_the_old_export_and_nothing_else(weights, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(weights, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        run(weights, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("format", ["torch", "official"])
def test_a_disk_that_fills_up_while_torch_saves_is_one_line(weights, tmp_path, format):
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writing more is an OSError
    try:
        with pytest.raises(UserError, match="cannot be written"):
            run(weights, out, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(weights, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        run(weights, tmp_path / "file" / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"format": "keras"}, "format must be one of timm"),
        ({"image_size": 18}, "multiple of the patch size 4"),
        ({"image_size": 20000}, "must be at most 512, that is 128 patches per side"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(weights, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run(weights, tmp_path / "out", **more)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_does_not_fit_the_machine_is_refused(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 15)  # 1 GiB
    with pytest.raises(UserError, match="image_size=512: .* take 16 GiB and there are 1; lower it"):
        run(weights, tmp_path / "out", image_size=512)
    assert list(tmp_path.iterdir()) == []


def test_card_of_published_weights_forbids_commercial_use(weights, tmp_path):
    weights.meta["licence"] = "CC BY-NC 4.0"
    run(weights, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "no commercial use" in card


@pytest.mark.parametrize(
    ("licence", "lines"),
    [
        ("mit", ["license: mit"]),
        ("CC BY 4.0", ["license: cc-by-4.0"]),
        ("not stated (its owner decides)", ["license: other", "license_name: not-stated"]),
        ("My Terms", ["license: other", "license_name: my-terms"]),
    ],
)
def test_the_card_names_and_links_other_licences(licence, lines, weights, tmp_path):
    weights.meta["licence"] = licence
    run(weights, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    if len(lines) > 1:
        assert "license_link" not in card
        assert f"## Licence\n\nOf the weights: {licence}." in card
    assert card.split("---")[1].strip().splitlines()[: len(lines)] == lines


@pytest.mark.parametrize("format", ["timm", "torch"])
def test_the_card_says_what_a_library_leaves_to_the_user(format, weights, tmp_path):
    weights.meta["data_depth"] = 12
    run(weights, tmp_path / "out", format)
    card = (tmp_path / "out" / "README.md").read_text()
    left = format == "timm"  # our own transform turns and scales
    assert ("`PIL.ImageOps.exif_transpose(image)`" in card) == left
    assert ("0 as black and 4095 as white" in card) == left
    assert read_weights(tmp_path / "out").meta["data_depth"] == 12


@pytest.mark.parametrize(
    "format", ["timm", "torch", "official", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_exports_keep_no_path_of_the_machine_that_made_them(format, weights, tmp_path):
    weights.meta["data"] = {"source": "folder", "root": "/home/ada/private"}
    weights.meta["init"] = "/home/ada/weights.pth"
    run(weights, tmp_path / "out", format)
    for path in (tmp_path / "out").iterdir():
        assert b"/home/ada" not in path.read_bytes(), path
        assert b"site-packages" not in path.read_bytes(), path
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| data | source folder |" in card
    assert "| started from | weights.pth |" in card
    again = read_weights(tmp_path / "out")
    assert again.meta["init"] == "weights.pth"
    again.meta["init"] = "timm/vit_small_patch16_224@/home/ada/vit.pth"
    run(again, tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "| started from | timm/vit_small_patch16_224@vit.pth |" in card


def test_the_card_of_a_run_from_scratch_says_so(weights, tmp_path):
    weights.meta["init"] = None
    run(weights, tmp_path / "out")
    assert "| started from | random weights |" in (tmp_path / "out" / "README.md").read_text()
    del weights.meta["init"]
    run(weights, tmp_path / "out", overwrite=True)
    assert "| started from | not stated |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_states_figures_of_exactly_these_weights(weights, tmp_path):
    common = {"classifier": "logistic", "labels": "1", "splits": 3, "top1_std": 0.01}
    named = {"weights": trunk_digest(weights.trunk), "image_size": 16}
    rows = [
        {"backbone": "msn", "top1_mean": 0.5, **common, **named},
        {"backbone": "random", "top1_mean": 0.25, **common, "weights": "r", "image_size": 16},
    ]

    def card(**more):
        run(weights, tmp_path / "out", overwrite=True, **more)
        return (tmp_path / "out" / "README.md").read_text()

    assert "50.0 \u00b1 1.0" in card(lowshot=rows)
    single = [{**row, "splits": 1, "top1_std": 0.0} for row in rows]
    assert "| 50.0 |" in card(lowshot=single)
    assert "25.0" in card(lowshot=rows)
    assert "Low-shot" not in card(lowshot=rows, image_size=32)
    assert "Low-shot" not in card(lowshot=[{**rows[0], "weights": "an older epoch's"}, rows[1]])
    assert "Low-shot" not in card(lowshot=[{**rows[0], "image_size": 32}, rows[1]])


def test_a_head_of_another_backbone_of_the_same_width_is_refused(weights, tmp_path):
    pytest.importorskip("transformers")
    head = Classifier(torch.randn(3, 32), None, ("a", "b", "c"), "class_token", True, True)
    own = dataclasses.replace(head, weights=trunk_digest(weights.trunk))
    run(weights, tmp_path / "own", "huggingface", head=own)
    with pytest.raises(UserError, match="another backbone"):
        run(make_weights(depth=1), tmp_path / "other", "huggingface", head=own)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 96])
@pytest.mark.parametrize("format", ["timm", "huggingface"])
def test_all_twelve_blocks_of_s16_agree_within_the_tolerance_itself(format, size, tmp_path):
    needs(format)
    weights = make_weights("s16" if size == 224 else "s16_96px", depth=12)
    report = run(weights, tmp_path / "out", format)
    assert report["max_abs_difference"] < 1e-5
    assert report["tolerance"] == 1e-5


@pytest.mark.slow
def test_damaged_onnx_files_are_refused_in_one_line(weights, tmp_path):
    needs("onnx")
    run(weights, tmp_path / "out", "onnx")
    whole = (tmp_path / "out" / "model.onnx").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"no model"):
        (tmp_path / "a.onnx").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.onnx") as caught:
            read_weights(tmp_path / "a.onnx")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["timm", "official", "torch"])
def test_another_eps_travels_or_is_refused(tmp_path, weights, format):
    found = dataclasses.replace(weights, model={**weights.model, "layer_norm_eps": 1e-3})
    arguments = {"format": format, "out": tmp_path / "out", "image_size": None, "head": None}
    if format == "torch":
        export(found, **arguments, overwrite=False, lowshot=None)
        assert read_weights(tmp_path / "out").model["layer_norm_eps"] == 1e-3
        return
    with pytest.raises(UserError, match=r"cannot express layer_norm_eps=0\.001"):
        export(found, **arguments, overwrite=False, lowshot=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["timm", "official", "torch"])
def test_a_flipped_bit_in_an_export_is_refused(tmp_path, weights, format):
    arguments = {"format": format, "out": tmp_path / "out", "image_size": None, "head": None}
    export(weights, **arguments, overwrite=False, lowshot=None)
    for path in tmp_path.glob("out/*.[ps]*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match="checksum does not match"):
            read_weights(path, num_heads=2)


@pytest.mark.parametrize("name", ["default", "no_sinkhorn", "wide"])
@pytest.mark.parametrize("only_target", [False, True])
def test_the_layout_survives_the_round_trip_bit_by_bit(tmp_path, name, only_target):
    layout = released_layout(name, only_target)
    torch.save(layout, tmp_path / "a.pth.tar")
    again = official_layout(read_weights(tmp_path / "a.pth.tar", num_heads=2))
    encoders = ["target_encoder"] if only_target else ["encoder", "target_encoder"]
    assert [key for key in again if key.endswith("encoder")] == encoders
    for encoder in encoders:
        assert_same(again[encoder], layout[encoder])
    assert torch.equal(again["prototypes"], layout["prototypes"])
    assert again.get("epoch") == layout.get("epoch")


def test_our_checkpoint_gets_the_names_of_the_reference(tmp_path):
    network = make_network()
    layout = official_layout(read_weights(save_checkpoint(tmp_path / "a.ckpt", network)))
    trunk, head, ignored = split_encoder(layout["encoder"])
    assert_same(trunk, network.anchor.trunk.state_dict())
    assert_same(head, network.anchor.head.state_dict())
    assert ignored == ()
    assert "module.fc.bn1.running_mean" in layout["target_encoder"]
    assert layout["epoch"] == 5


def test_the_prediction_head_of_the_reference_is_ignored():
    encoder = {"module.pred.fc1.weight": torch.ones(1), "module.norm.bias": torch.ones(2)}
    trunk, head, ignored = split_encoder(encoder)
    assert (list(trunk), head, ignored) == (["norm.bias"], None, ("pred.fc1.weight",))


def test_a_finished_run_is_exported_with_its_anchor_head_and_prototypes(tmp_path):
    network = make_network()
    save_run(tmp_path / "run", network.target.trunk)
    save_checkpoint(tmp_path / "run" / "checkpoints" / "epoch-5-step-50.ckpt", network)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    where = [f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]
    command.run(compose("export", [*where, "format=official"]))
    weights = read_weights(tmp_path / "out" / "msn.pth.tar")
    assert_same(weights.trunk, network.target.trunk.state_dict())
    assert_same(weights.anchor_head, network.anchor.head.state_dict())
    assert torch.equal(weights.prototypes, network.prototypes)
