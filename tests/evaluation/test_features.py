import errno
import os

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from msn.commands.eval_lowshot import baselines
from msn.errors import UserError
from msn.evaluation import features
from msn.evaluation.backbones import LARGEST_SIDE, FrozenBackbone, RawPixels
from msn.evaluation.features import (
    FeatureSettings,
    Runtime,
    extract_features,
    forward_feature,
)
from msn.weights.backbone import image_transform
from msn.weights.weights import IMAGENET_MEAN, IMAGENET_STD
from tests.evaluation.toys import FEATURES, MODEL, ToyImages, toy_trunk

CPU = torch.device("cpu")
TRANSFORM = image_transform(MODEL["img_size"], mean=IMAGENET_MEAN, std=IMAGENET_STD)


def extract(trunk, images, runtime=None, **changes):
    return extracted(trunk, images, runtime, **changes).rows


def extracted(trunk, images, runtime=None, **changes):
    return extract_features(
        trunk,
        images,
        transform=TRANSFORM,
        settings=FeatureSettings(**{**FEATURES, **changes}),
        runtime=runtime or Runtime((CPU,)),
        preprocessing={"image_size": MODEL["img_size"]},
        title="toys",
    )


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of two batches of 8."""
    monkeypatch.setattr(features, "_PART", 16)


def parts_below(directory):
    return sorted(directory.glob("*/part-*.safetensors"))


@torch.no_grad()
def direct(trunk, images, norm):
    batch = torch.stack([TRANSFORM(images[i]) for i in range(len(images))])
    return trunk.forward_features(batch, norm=norm)


def test_class_token_is_taken_before_the_final_norm_and_in_order():
    trunk, images = toy_trunk(), ToyImages(7)
    expected = direct(trunk, images, norm=False)[:, 0]
    torch.testing.assert_close(extract(trunk, images), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_other_feature_is_what_its_name_says():
    trunk, images = toy_trunk(), ToyImages(3)
    trunk.norm.weight.mul_(torch.linspace(0.5, 2, MODEL["embed_dim"]))  # a norm that shows
    normed = direct(trunk, images, norm=True)
    batch = torch.stack([TRANSFORM(images[i]) for i in range(len(images))])
    first, second = trunk.forward_intermediates(batch, 2)
    expected = {
        "class_token_norm": normed[:, 0],
        "patch_mean": normed[:, 1:].mean(dim=1),
        "patch_mean_norm": trunk.norm(second[:, 1:].mean(dim=1)),
        "last_1": normed[:, 0],
        "tokens": torch.cat([4 * second[:, 0], normed[:, 1:].flatten(1)], dim=1),
        "last_2": torch.cat([trunk.norm(first[:, 0]), trunk.norm(second[:, 0])], dim=1),
    }
    for name, rows in expected.items():
        torch.testing.assert_close(extract(trunk, images, feature=name), rows, rtol=0, atol=1e-5)


def test_the_trunk_is_left_in_its_mode_and_dropout_is_off():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3 * 16 * 16, 4), nn.Identity()
            self.drop = nn.Dropout(0.9)

        def forward_intermediates(self, images, last):
            return [self.drop(self.linear(images.flatten(1))).unsqueeze(1)]

    trunk = Noisy().train()
    first, second = extract(trunk, ToyImages(2)), extract(trunk, ToyImages(2))
    assert trunk.training
    assert torch.equal(first, second)
    assert (first != 0).all()


def test_bf16_is_close_to_float32_and_returned_as_float32():
    trunk, images = toy_trunk(), ToyImages(4)
    full, half = extract(trunk, images), extract(trunk, images, precision="bf16")
    assert half.dtype == torch.float32
    cosines = nn.functional.cosine_similarity(full, half)
    assert cosines.min() > 0.999
    assert not torch.equal(full, half)


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="tf32 is for CUDA, not for cpu"):
        extract(toy_trunk(), ToyImages(2), precision="tf32")


def test_cached_features_are_used_without_opening_an_image(tmp_path, small_parts):
    trunk, runtime = toy_trunk(), Runtime((CPU,), cache_dir=tmp_path)
    first = extract(trunk, ToyImages(15), runtime)
    assert len(parts_below(tmp_path)) == 3
    again = ToyImages(15)
    assert torch.equal(extract(trunk, again, runtime), first)
    assert again.opened == []


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other rows"])
def test_a_damaged_part_is_made_again_and_only_that_part(tmp_path, small_parts, damage, caplog):
    trunk, runtime = toy_trunk(), Runtime((CPU,), cache_dir=tmp_path)
    first = extract(trunk, ToyImages(15), runtime)
    part = parts_below(tmp_path)[1]
    content = part.read_bytes()
    if damage == "cut":
        part.write_bytes(content[:-100])
    elif damage == "changed":  # same size, still a valid file
        part.write_bytes(content[:-4] + b"\0\0\x80\x3f")
    elif damage == "empty":
        part.write_bytes(b"")
    else:
        with safe_open(part, framework="pt") as file:
            metadata = file.metadata()
        save_file({"features": load_file(part)["features"][:5].clone()}, part, metadata)
    again = ToyImages(15)
    assert torch.equal(extract(trunk, again, runtime), first)
    assert sorted(set(again.opened)) == list(range(16, 32))
    assert "recomputing" in caplog.text
    assert torch.equal(load_file(part)["features"], first[16:32])


def test_an_interrupted_extraction_goes_on_where_it_was(tmp_path, small_parts):
    class Stops(ToyImages):
        def __getitem__(self, i):
            if i == 20:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    trunk, runtime = toy_trunk(), Runtime((CPU,), cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        extract(trunk, Stops(15), runtime)
    assert len(parts_below(tmp_path)) == 1
    again = ToyImages(15)
    found = extract(trunk, again, runtime)
    assert min(again.opened) == 16
    assert torch.equal(found, extract(trunk, ToyImages(15)))


def test_anything_that_changes_features_changes_the_key(tmp_path):
    runtime = Runtime((CPU,), cache_dir=tmp_path)
    extract(toy_trunk(), ToyImages(2), runtime)
    renamed = ToyImages(2)
    renamed.names = [*renamed.names[1:], "other.png"]
    extract(toy_trunk(), renamed, runtime)
    extract(toy_trunk(seed=1), ToyImages(2), runtime)
    extract(toy_trunk(), ToyImages(2), runtime, feature="patch_mean")
    extract(toy_trunk(), ToyImages(2), runtime, precision="bf16")
    repainted = ToyImages(2)
    repainted.pixels[3] //= 2
    extract(toy_trunk(), repainted, runtime)
    assert len(parts_below(tmp_path)) == 6


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    found = extract(toy_trunk(), ToyImages(2), Runtime((CPU,), cache_dir=blocked))
    assert torch.equal(found, extract(toy_trunk(), ToyImages(2)))
    assert "cannot write" in caplog.text


def test_several_devices_give_what_one_gives(small_parts):
    trunk, images = toy_trunk(), ToyImages(15)
    expected = extract(trunk, images)
    assert torch.equal(extract(trunk, images, Runtime((CPU, CPU))), expected)


def test_workers_give_what_the_main_process_gives():
    trunk, images = toy_trunk(), ToyImages(4)
    assert torch.equal(extract(trunk, images, Runtime((CPU,), 2)), extract(trunk, images))


def _shared(rank: int, directory: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2
    )
    features._PART = 8
    images = ToyImages(15)
    found = extract(toy_trunk(), images, Runtime((CPU,), shared=True))
    torch.save((found, len(images.opened)), f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # starts two processes
def test_two_processes_share_the_work_and_both_get_all_of_it(tmp_path):
    mp.spawn(_shared, (str(tmp_path),), nprocs=2)
    expected = extract(toy_trunk(), ToyImages(15))
    opened = []
    for rank in range(2):
        found, count = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        opened.append(count)
    assert sorted(opened) == [21, 24]  # 45 images in parts of 8


def test_features_that_are_not_finite_name_the_first_image():
    trunk = toy_trunk()
    with torch.no_grad():
        trunk.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"6 of 6 images hold NaN .* \(first: class0/0.png\)"):
        extract(trunk, ToyImages(2), feature="class_token_norm")


@pytest.mark.parametrize("name", ["cls", "last_0", "last_x", ""])
def test_unknown_features_are_refused(name):
    with pytest.raises(UserError, match="feature must be native"):
        FeatureSettings(**{**FEATURES, "feature": name})


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(UserError, match="feature=last_3: this backbone has 2 blocks"):
        extract(toy_trunk(), ToyImages(1), feature="last_3")


@pytest.mark.parametrize(
    "change",
    [
        *({"batch_size": 0}, {"precision": "fp16"}, {"image_size": 0}),
        {"image_size": 30000, "batch_size": 2},
    ],
)
def test_bad_settings_name_themselves(change):
    with pytest.raises(UserError, match=rf"features.{next(iter(change))}(=\d+:)? must be"):
        FeatureSettings(**{**FEATURES, **change})


def pixels(images, size, runtime=None):
    settings = FeatureSettings(**FEATURES)
    return RawPixels("pixels", size).features(images, settings, runtime or Runtime((CPU,)), "").rows


def test_pixels_are_those_of_the_centre_crop():
    images = ToyImages(1, size=12)
    rows = pixels(images, 12)
    assert torch.equal(rows, images.pixels.flatten(1).float() / 255)
    assert pixels(images, 6).shape == (3, 3 * 36)
    assert pixels(images, 6).mean() == pytest.approx(rows.mean().item(), abs=0.01)


def test_pixels_of_large_models_are_few_and_kept_like_other_features(tmp_path):
    (baseline,) = baselines(["pixels"], FrozenBackbone("msn", toy_trunk(), 224), seed=0)
    assert baseline.size == LARGEST_SIDE == 32
    runtime, again = Runtime((CPU,), cache_dir=tmp_path), ToyImages(2)
    first = pixels(ToyImages(2), 4, runtime)
    assert torch.equal(pixels(again, 4, runtime), first)
    assert again.opened == []
    assert not torch.equal(pixels(again, 2, runtime), first[:, :12])


def test_a_part_with_an_image_that_cannot_be_read_is_told_and_not_cached(tmp_path, small_parts):
    trunk, runtime = toy_trunk(), Runtime((CPU,), num_workers=2, cache_dir=tmp_path)
    found = extracted(trunk, ToyImages(15, unreadable=[20]), runtime)
    assert torch.nonzero(found.replaced).flatten().tolist() == [20]
    assert [path.stem for path in parts_below(tmp_path)] == ["part-00000", "part-00002"]
    again = extracted(trunk, ToyImages(15), runtime)
    assert not again.replaced.any()
    assert len(parts_below(tmp_path)) == 3


def test_a_full_disk_leaves_no_temporary_files_in_the_cache(tmp_path, monkeypatch, caplog):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    extract(toy_trunk(), ToyImages(2), Runtime((CPU,), cache_dir=tmp_path))
    assert "No space left" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_one_batch_of_a_feature_has_its_width():
    images = torch.randn(5, 3, 16, 16)
    assert forward_feature(toy_trunk(), images, "last_2").shape == (5, 48)


def test_a_whole_image_keeps_what_lies_at_its_edge(tmp_path):
    class Edges(ToyImages):
        """Wide images of which the last columns alone differ."""

        def __getitem__(self, i):
            pixels = torch.zeros(16, 48, 3, dtype=torch.uint8)
            pixels[:, 44:] = 250 * (i % 2)
            return Image.fromarray(pixels.numpy())

    images, runtime = Edges(2), Runtime((CPU,), cache_dir=tmp_path)
    for subject in (FrozenBackbone("msn", toy_trunk(), 16), RawPixels("pixels", 16)):
        cut, whole = (
            subject.features(images, FeatureSettings(**{**FEATURES, "crop": crop}), runtime, "")
            for crop in ("centre", "whole")
        )
        assert cut.rows[0].equal(cut.rows[1])
        assert not whole.rows[0].allclose(whole.rows[1])
    with pytest.raises(UserError, match="must be one of centre, whole"):
        FeatureSettings(**{**FEATURES, "crop": "none"})
