import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.functional import pil_to_tensor

import msn
from msn.errors import UserError
from msn.weights import Backbone, save_backbone
from msn.weights.weights import IMAGENET_MEAN, IMAGENET_STD
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


def test_an_image_of_the_size_of_a_small_backbone_is_not_touched(tmp_path):
    image = Image.fromarray(load_sample_images().images[0][:32, :32])
    seen = msn.load_backbone(save_run(tmp_path, make_trunk())).transform(image)
    mean, std = (torch.tensor(part)[:, None, None] for part in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(seen * std + mean, pil_to_tensor(image) / 255, atol=1e-6)


def test_the_transform_takes_gray_images_and_travels_to_workers(tmp_path):
    backbone = msn.load_backbone(save_run(tmp_path, make_trunk()))
    transform = pickle.loads(pickle.dumps(backbone.transform))
    assert transform(Image.new("L", (50, 40))).shape == (3, 32, 32)


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
