"""Colour changes in place are those of torchvision on tensors, which work without whole levels."""

import pytest
import torch
from torchvision.transforms import functional

from msn.data.colour import blend, gray_image, mean_gray, turn_hue
from tests.data.photos import load_photos


@pytest.fixture
def colours():
    """A photograph, pure colours, greys, black and white: [2, 3, 20, 30], 0 to 255."""
    photo = torch.from_numpy(load_photos()[1][:20, :30].copy()).permute(2, 0, 1).float()
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, 128.0, 254.0, 255.0])] * 3)
    other = photo.flatten(1).clone()
    other[:, :125] = corners.T
    return torch.stack([photo, other.view(3, 20, 30)])


@pytest.mark.parametrize("turns", [-0.5, -0.31, -0.1, 0.0, 0.04, 0.1, 0.25, 0.5])
def test_hue_turns_as_in_hsv(colours, turns):
    theirs = functional.adjust_hue(colours / 255, turns) * 255
    ours = turn_hue(colours.clone(), torch.full((2, 1, 1, 1), turns))
    assert (ours - theirs).abs().max() < 0.01


@pytest.mark.parametrize("factor", [0.6, 0.95, 1.4])
def test_blends_are_torchvision_s_less_half_a_level(colours, factor):
    x = colours / 255
    cases = (
        (functional.adjust_brightness(x, factor), lambda _: None),
        (functional.adjust_contrast(x, factor), mean_gray),
        (functional.adjust_saturation(x, factor), gray_image),
    )
    for theirs, base in cases:
        expected = (theirs * 255 - 0.5).clamp(min=0)
        ours = blend(colours.clone(), base(colours.clone()), torch.full((2, 1, 1, 1), factor))
        # Torchvision's own luma differs in the fourth place; means are rounded here.
        inside = (theirs < 1) & (expected > 0)
        assert ((ours - expected)[inside]).abs().max() < 0.5
