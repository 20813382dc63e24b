"""The sheet of a masked autoencoder, as a picture and as a command."""

import numpy as np
import pytest
import torch
from PIL import Image

import msn
from msn.errors import UserError
from msn.method.mae import Reconstruction, patchify
from msn.reporting.reconstruction import reconstruction_caption, reconstruction_sheet
from tests.weights.test_mae import make_mae, save_checkpoint

SIDE, GAP, TOP = 96, 6, 18 + 6


def cells(sheet, row):
    top = TOP + row * (SIDE + GAP)
    lefts = [GAP + i * (SIDE + GAP) for i in range(4)]
    return [np.asarray(sheet)[top : top + SIDE, left : left + SIDE].astype(int) for left in lefts]


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_right_prediction_is_the_image_again(tmp_path, monkeypatch, norm_pix_loss):
    mae = make_mae(norm_pix_loss=norm_pix_loss)
    mae = msn.load_mae(save_checkpoint(tmp_path / "a.ckpt", mae))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = torch.stack([mae.transform(image.to(torch.uint8)) for image in pixels])

    def exact(images, noise):
        found = patchify(images, 8)
        variance, mean = torch.var_mean(found, dim=-1, keepdim=True)
        found = (found - mean) / (variance + 1e-6).sqrt() if norm_pix_loss else found
        mask = torch.zeros(len(images), 16)
        mask[:, 3:] = 1
        return Reconstruction(torch.zeros(()), found, mask)

    monkeypatch.setattr(mae, "forward", exact)
    sheet = reconstruction_sheet(mae, images, seed=0)
    for row in range(2):
        image, masked, whole, mixed = cells(sheet, row)
        expected = pixels[row].permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
        assert np.abs(image - expected).max() <= 1
        assert np.abs(whole - expected).max() <= 1
        assert np.abs(mixed - expected).max() <= 1
        assert (masked[:24, :72] == image[:24, :72]).all()
        assert (masked[24:] == 128).all()
    assert ("scaled back" in reconstruction_caption(mae, 2)) is norm_pix_loss


def test_the_command_draws_images_of_a_folder_and_refuses_what_has_no_decoder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    checkpoint, out = save_checkpoint(tmp_path / "a.ckpt", make_mae()), tmp_path / "mae.png"
    assert msn.show_reconstruction(checkpoint, folder, out, images=2) == out
    picture = Image.open(out)
    assert picture.size == (4 * SIDE + 5 * GAP, 18 + 2 * SIDE + 3 * GAP)
    image, masked, _, mixed = cells(picture, 0)
    visible = (masked != 128).any(axis=-1)
    assert (mixed[visible] == image[visible]).all()
    assert 0 < visible.mean() <= 0.5
    torch.save(make_mae(embed_dim=192).trunk.state_dict(), tmp_path / "trunk.pth")
    with pytest.raises(UserError, match="holds no decoder"):
        msn.show_reconstruction(tmp_path / "trunk.pth", folder, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()
