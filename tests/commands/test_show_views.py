"""`msn show_views` draws what a training would see, from any folder, and says what is wrong."""

import numpy as np
import pytest
from PIL import Image

from msn.commands.entry import build, compose
from msn.data.sampler import BatchKey
from msn.reporting.pictures import views_sheet

SMALL = ["experiment=small_images", "data.global_batch_size=4", "images=3", "epoch=2", "seed=5"]


def test_the_sheet_shows_the_first_images_of_the_epoch_as_training_sees_them(
    command, images, tmp_path
):
    where = f"data.root={images}"
    code, out, _ = command("show_views", *SMALL, where, f"out={tmp_path / 'views.png'}")
    assert code == 0
    assert "3 of 18 images with 6 views each" in out  # a fifth of each class is held out
    sheet = np.asarray(Image.open(tmp_path / "views.png"))

    config = compose("train", [*(s for s in SMALL if s[:4] not in ("imag", "epoc")), where])
    data, module = build(config, "data"), build(config, "module")
    epoch, number, indices = data.sampler(rank=0, world_size=1).keys(2)[0]
    data.use_reference = True  # every pixel is kept, and the oracle draws
    batch = next(iter(data.loader([BatchKey(epoch, number, indices[:3])])))
    key = (5 << 32) + 2 * (18 // 4)
    patch = config.model.patch_size
    kept = module.patch_drop.draw(
        (32 // patch) ** 2, rand_views=1, images=range(3), global_batch_size=4, key=key
    )
    originals = [Image.fromarray(batch.image(i).numpy()) for i in range(3)]
    views = data.make_views(batch)
    drawn = np.asarray(views_sheet(views, kept, patch_size=patch, originals=originals))
    assert sheet.shape == drawn.shape
    assert np.abs(sheet.astype(int) - drawn).mean() < 0.5


def test_the_sheet_of_a_masked_autoencoder_shows_what_its_encoder_sees(command, images, tmp_path):
    small = ["experiment=mae_small_images", *SMALL[1:]]
    code, out, error = command(
        "show_views", *small, f"data.root={images}", f"out={tmp_path / 'views.png'}"
    )
    assert code == 0, error
    sheet = np.asarray(Image.open(tmp_path / "views.png")).astype(int)

    config = compose(
        "train", [*(s for s in small if s[:4] not in ("imag", "epoc")), f"data.root={images}"]
    )
    data, module = build(config, "data"), build(config, "module")
    key = data.sampler(rank=0, world_size=1).keys(2)[0]
    batch = next(iter(data.loader([BatchKey(key.epoch, key.batch, key.indices[:3])])))
    views = data.on_after_batch_transfer(batch, 0)
    seen = module.draw_noise(views).argsort(dim=1)[:, : module.network.num_kept]
    masked = views._replace(rand=views.target[None])
    originals = [Image.fromarray(batch.image(i).numpy()) for i in range(3)]
    patch = config.model.patch_size
    drawn = views_sheet(masked, seen[None], patch_size=patch, originals=originals, masked="masked")
    assert np.abs(sheet - np.asarray(drawn)).mean() < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.root=DIR"], "out must be given"),
        (["data.root=/no/such", "out=DIR/x.png"], "there is no such folder"),
        (["data.root=DIR", "out=DIR/x.txt"], "must end in .png"),
        (["data.root=DIR", "out=DIR/no/x.png"], "name a file in an existing directory"),
        (
            ["data.root=DIR", "out=DIR/x.png", "images=0"],
            "images must be a whole number >= 1, got 0",
        ),
        (["data.root=DIR", "out=DIR/x.png", "data.views.rand_size=100000"], "lower images, or"),
        (["data.root=DIR", "out=DIR/x.png", "data.views.focal_views=1000000"], "lower images, or"),
    ],
)
def test_mistakes_end_in_one_line(command, images, arguments, message):
    code, _, err = command("show_views", *(a.replace("DIR", str(images)) for a in arguments))
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (images / "x.png").exists()


def test_a_folder_without_a_readable_image_is_refused(command, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"no image")
    where = [f"data.root={tmp_path / 'in'}", f"out={tmp_path / 'x.png'}"]
    code, _, err = command("show_views", *SMALL, *where)
    assert code == 2
    assert "no image can be read" in err.splitlines()[-1]
    assert not (tmp_path / "x.png").exists()
