import pickle

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_sample_images
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor

import msn
from msn.errors import UserError
from msn.evaluation.backbones import pixel_transform
from msn.images.decode import decode, full_size
from msn.weights import Backbone, save_backbone
from msn.weights.backbone import image_transform, trimmed
from msn.weights.weights import IMAGENET_MEAN, IMAGENET_STD
from tests.data.tiffs import deep_png
from tests.weights.builders import (
    images,
    make_network,
    make_trunk,
    save_checkpoint,
    save_run,
)
from tests.weights.conftest import assert_same


def test_five_lines_give_features(tmp_path):
    trunk = make_trunk()
    save_run(tmp_path, trunk)
    backbone = msn.load_backbone(tmp_path)
    image = Image.fromarray(load_sample_images().images[0])
    pixels = backbone.transform(image)[None]
    with torch.no_grad():
        assert torch.equal(
            backbone.forward_features(pixels), trunk.forward_features(pixels, norm=True)
        )
        assert torch.equal(backbone(pixels), trunk.forward_features(pixels, norm=True)[:, 0])
        before = backbone.forward_features(pixels, norm=False)
        assert torch.equal(before, trunk.forward_features(pixels, norm=False))
    assert isinstance(backbone, torch.nn.Module)
    assert not backbone.training
    assert_same(backbone.state_dict(), trunk.state_dict())
    assert backbone.meta["epoch"] == 3


@pytest.mark.parametrize(("size", "short"), [(32, 32), (96, 110), (224, 256)])
def test_the_transform_is_the_paper_s_and_takes_small_images_whole(tmp_path, size, short):
    backbone = msn.load_backbone(save_run(tmp_path, make_trunk(img_size=size)))
    for photo in load_sample_images().images:
        for image in (Image.fromarray(photo), Image.fromarray(photo).rotate(90, expand=True)):
            scale = short / min(image.size)
            resized = image.resize([int(side * scale) for side in image.size], Image.BILINEAR)
            left, top = (round((side - size) / 2) for side in resized.size)
            pixels = np.asarray(resized.crop((left, top, left + size, top + size))) / 255
            expected = (pixels - IMAGENET_MEAN) / np.asarray(IMAGENET_STD)
            torch.testing.assert_close(
                backbone.transform(image).double(),
                torch.from_numpy(expected).permute(2, 0, 1),
                rtol=0,
                atol=1e-5,
            )


def test_the_transform_takes_arrays_and_names_what_it_does_not(tmp_path):
    transform = image_transform(32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    array = load_sample_images().images[0]
    assert torch.equal(transform(array), transform(Image.fromarray(array)))
    assert torch.equal(transform(array[..., 0]), transform(Image.fromarray(array[..., 0])))
    assert torch.equal(transform(array[:, ::-1]), transform(Image.fromarray(array[:, ::-1].copy())))
    for wrong in (array / 255.0, array[..., :2], array[None], array[:0], array.astype("uint16")):
        with pytest.raises(UserError, match=r"an array must be uint8 .* got \w+ \[") as said:
            transform(wrong)
        assert "\n" not in str(said.value)
    with pytest.raises(UserError, match="got list$"):
        transform([[1, 2], [3, 4]])


def test_an_image_of_the_size_of_a_small_backbone_is_not_touched(tmp_path):
    image = Image.fromarray(load_sample_images().images[0][:32, :32])
    seen = msn.load_backbone(save_run(tmp_path, make_trunk())).transform(image)
    mean, std = (torch.tensor(part)[:, None, None] for part in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(seen * std + mean, pil_to_tensor(image) / 255, atol=1e-6)


def test_the_transform_takes_gray_images_and_travels_to_workers(tmp_path):
    backbone = msn.load_backbone(save_run(tmp_path, make_trunk()))
    transform = pickle.loads(pickle.dumps(backbone.transform))
    assert transform(Image.new("L", (50, 40))).shape == (3, 32, 32)


def pictures(image, tmp_path):
    """The same image as people have it."""
    image.save(tmp_path / "a.png")
    plain = Image.open(tmp_path / "a.png")
    yield str(tmp_path / "a.png")
    yield tmp_path / "a.png"
    yield plain
    yield Image.open(tmp_path / "a.png")
    yield pil_to_tensor(image)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_transform_takes_a_path_a_picture_and_a_tensor(tmp_path, mode):
    transform = msn.load_backbone(save_run(tmp_path, make_trunk())).transform
    image = Image.fromarray(load_sample_images().images[0][:50, :60]).convert(mode)
    expected = transform(image.convert("RGB"))
    for picture in pictures(image, tmp_path):
        assert torch.equal(transform(picture), expected)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_the_transform_takes_pictures_of_any_mode(tmp_path, mode):
    transform = msn.load_backbone(save_run(tmp_path, make_trunk())).transform
    image = Image.fromarray(load_sample_images().images[0][:50, :60])
    if mode == "I;16":
        gray = np.asarray(image.convert("L"))
        image, expected = Image.fromarray(gray.astype(np.uint16) << 8), Image.fromarray(gray)
    else:
        image = image.convert(mode)
        expected = image
    assert torch.equal(transform(image), transform(expected.convert("RGB")))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_the_transform_turns_what_training_turns(tmp_path, suffix, orientation):
    transform = msn.load_backbone(save_run(tmp_path, make_trunk())).transform
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(load_sample_images().images[0][:40, :60]).save(path, exif=tags, **options)
    expected = transform(Image.fromarray(decode(path.read_bytes(), full_size).pixels))
    assert torch.equal(transform(path), expected)
    assert torch.equal(transform(Image.open(path)), expected)
    assert torch.equal(transform(Image.open(path).convert("RGB")), expected)
    assert torch.equal(transform(ImageOps.exif_transpose(Image.open(path))), expected)


def test_the_transform_reads_16_bits_as_the_training_did(tmp_path):
    trunk = make_trunk()
    meta = {"model": trunk.model_config, "method": {}, "data_depth": 12}
    save_backbone(tmp_path / "a.safetensors", trunk.state_dict(), meta)
    transform = msn.load_backbone(tmp_path / "a.safetensors").transform
    gray = np.arange(40 * 40).reshape(40, 40) % 256
    (tmp_path / "a.png").write_bytes(deep_png((gray << 4).astype(np.uint16)))
    expected = transform(Image.fromarray(gray.astype(np.uint8)))
    assert torch.equal(transform(tmp_path / "a.png"), expected)
    assert torch.equal(transform(Image.open(tmp_path / "a.png")), expected)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg: cannot be read .No such file"),
        (Image.new("F", (9, 9)), "floating-point"),
        (torch.rand(3, 9, 9), r"must be uint8 .3, H, W., .*got float32 .3, 9, 9."),
        (torch.zeros(9, 9, 3, dtype=torch.uint8), r"got uint8 .9, 9, 3."),
        (torch.zeros(3, 0, 0, dtype=torch.uint8), r"got uint8 .3, 0, 0."),
        (torch.tensor(7, dtype=torch.uint8), r"got uint8 .."),
        (Image.new("RGB", (0, 5)), "must have pixels, got 0 x 5"),
        (7, "must be a path, a PIL image, an array or a tensor"),
    ],
)
def test_what_is_no_image_is_told(tmp_path, picture, message):
    transform = msn.load_backbone(save_run(tmp_path, make_trunk())).transform
    with pytest.raises(UserError, match=message):
        transform(picture)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (30_000, 3)])
def test_a_very_thin_image_takes_little_memory(size, monkeypatch):
    asked = []
    resize = Image.Image.resize

    def counting(image, size, *arguments, **options):
        asked.append(size[0] * size[1])
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", counting)
    image = Image.new("RGB", size, "teal")
    transform = image_transform(224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert transform(image).shape == (3, 224, 224)
    assert pixel_transform(32)(image).shape == (3 * 32 * 32,)
    assert max(asked) <= 9 * 256 * 256


@pytest.mark.parametrize("shape", [(20, 301), (301, 20), (40, 900)])
def test_the_crop_of_a_thin_image_is_that_of_the_whole(shape):
    photo = load_sample_images().images[0].repeat(2, axis=1).repeat(2, axis=0)
    image = Image.fromarray(photo[: shape[0], : shape[1]])
    transform = image_transform(96, mean=(0, 0, 0), std=(1, 1, 1))
    trimming = [step for step in transform.transforms if step is not trimmed]
    whole = Compose(trimming)(image)
    assert trimmed(image).size != image.size
    assert (transform(image) - whole).abs().max() < 0.05
    assert (transform(image) - whole).abs().mean() < 0.005


def test_it_is_the_target_of_a_checkpoint_at_any_image_size(tmp_path):
    network = make_network()
    backbone = msn.load_backbone(save_checkpoint(tmp_path / "a.ckpt", network))
    assert isinstance(backbone, Backbone)
    with torch.no_grad():
        for size in (32, 48):
            expected = network.target.trunk.forward_features(images(size), norm=True)
            assert torch.equal(backbone.forward_features(images(size)), expected)


def test_heads_are_told_where_the_file_is_silent(tmp_path):
    torch.save(make_trunk().state_dict(), tmp_path / "a.pth")
    assert msn.load_backbone(tmp_path / "a.pth", num_heads=3).num_heads == 3
    with pytest.raises(UserError, match="not divisible by"):
        msn.load_backbone(tmp_path / "a.pth", num_heads=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_half_precision(tmp_path, dtype):
    backbone = msn.load_backbone(save_run(tmp_path, make_trunk()))
    with torch.no_grad():
        expected = backbone(images(32))
        found = backbone.to(dtype)(images(32).to(dtype))
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    trunk = make_trunk()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_backbone(
            tmp_path / "file" / "a.safetensors", trunk.state_dict(), {"model": trunk.model_config}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
