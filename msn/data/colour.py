"""Colour changes in whole gray levels, as Pillow makes them, for one view or many at once.

Pixels are floats that hold whole numbers 0 to 255, planes first: [..., 3, H, W]. Brightness,
contrast and saturation move a view towards or away from a base: black, its mean gray, its gray
image. Hue turns the colour circle. `out` arguments are written to and save the cost of fresh
memory, which on a CPU is higher than that of the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ITU-R 601 luma with the 16-bit weights that Pillow uses.
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
HUE_STEPS = 255  # Pillow turns the hue by whole 1/255 of the circle, fractions cut off
HUE_PLANES = 8  # scratch planes that `turn_hue` needs


def gray_image(pixels: Tensor, out: Tensor | None = None) -> Tensor:
    """Gray values of a colour image, [..., 3, H, W] to [..., H, W], rounded."""
    red, green, blue = pixels.unbind(-3)
    gray = torch.mul(red, LUMA[0], out=out)
    return gray.add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).round_()


def blend(pixels: Tensor, base: Tensor | float, factor: Tensor | float) -> Tensor:
    """Move pixels away from a base, in place: factor 0 gives the base, 1 the pixels, 2 beyond.

    Args:
        pixels: [..., 3, H, W].
        base: broadcasts against `pixels`.
        factor: broadcasts against `pixels`.
    """
    # Pillow cuts fractions off; x + (factor - 1) * 0 stays a whole number, f * x + (1 - f) * x not.
    return pixels.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def turn_hue(pixels: Tensor, turns: Tensor | float, scratch: Tensor) -> Tensor:
    """Turn the colours around the circle in place; value and saturation stay.

    Written without branches or division into sextants: a channel is a wave of the angle h that is
    full within 1 (a sixth of the circle) of its own colour and empty from 2 on.

    Args:
        pixels: [..., 3, H, W].
        turns: in [-0.5, 0.5], whole multiples of 1/255; broadcasts against [..., H, W].
        scratch: [HUE_PLANES, ..., H, W], overwritten.
    """
    red, green, blue = pixels.unbind(-3)
    high, low, chroma, angle, most, mask, step, wave = scratch.unbind(0)
    torch.maximum(red, green, out=most)
    torch.maximum(most, blue, out=high)
    torch.minimum(red, green, out=low)
    torch.minimum(low, blue, out=low)
    torch.sub(high, low, out=chroma)

    # Angle times chroma: g - b where red is greatest, 2c + b - r if green, 4c + r - g if blue.
    torch.sub(green, blue, out=angle)
    torch.gt(green, red, out=mask)
    torch.sub(blue, red, out=step).add_(chroma, alpha=2).sub_(angle)
    angle.addcmul_(mask, step)
    torch.gt(blue, most, out=mask)
    torch.sub(red, green, out=step).add_(chroma, alpha=4).sub_(angle)
    angle.addcmul_(mask, step)
    torch.clamp(chroma, min=1, out=step)  # chroma is whole, so this only avoids 0 / 0
    angle.div_(step).add_(6 * turns)  # in [-1 - 3, 5 + 3]

    # Distance d from the colours at 0, 2 and 4; full to 1, empty from 2: high - c * clamp(d - 1).
    for channel, colour in ((red, 0), (green, 2), (blue, 4)):
        # |(h - colour) wrapped to [-3, 3]|, without a remainder, which is slow on a CPU.
        torch.sub(angle, colour, out=wave)
        torch.mul(wave, 1 / 6, out=step).round_()
        wave.sub_(step, alpha=6).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(high, chroma, wave, value=-1, out=channel)
    return pixels.round_()


def whole_turns(hue: float) -> float:
    """The turn that Pillow makes of a hue in [-0.5, 0.5]."""
    return int(hue * HUE_STEPS) / HUE_STEPS
