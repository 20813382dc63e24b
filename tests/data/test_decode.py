"""Every kind of file becomes the upright RGB pixels it shows; damaged ones say what is wrong."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from msn.data.decode import BadImageError, decode, full_size
from tests.data.photos import photo


def encode(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data):
    return decode(data, full_size).pixels


def exif(orientation):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_every_format_gives_pillows_rgb(kind):
    data = encode(photo(1), kind)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels(data), theirs)
    assert theirs.shape == (48, 64, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_every_mode_gives_pillows_rgb(mode, kind):
    try:
        data = encode(photo(2).convert(mode), kind)
    except OSError:
        pytest.skip(f"no {kind} holds {mode}")
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels(data), theirs)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_every_kind_of_jpeg_gives_pillows_rgb(options):
    data = encode(photo(4), "JPEG", **options)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


def test_a_palette_with_transparency_keeps_its_colours():
    image = photo(3).convert("P")
    image.info["transparency"] = 0
    data = encode(image, "PNG")
    assert np.array_equal(pixels(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(kind):
    gray = np.asarray(photo(1).convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 256 + 200)
    assert np.array_equal(pixels(encode(deep, kind)), np.repeat(gray[..., None], 3, 2))


def test_floating_point_pixels_are_refused():
    with pytest.raises(BadImageError, match="floating-point"):
        pixels(encode(photo(1).convert("F"), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(photo(5), kind, exif=exif(orientation), **options)
    image = Image.open(io.BytesIO(data))
    image.load()  # a TIFF turns while it loads
    theirs = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    ours = decode(data, full_size)
    assert np.array_equal(ours.pixels, theirs)
    assert (ours.height, ours.width) == theirs.shape[:2]


@pytest.mark.parametrize(("kind", "orientation"), [("JPEG", 1), ("JPEG", 6), ("PNG", 1)])
@pytest.mark.parametrize("reduction", [1, 2, 3, 4, 6, 9])
def test_a_reduced_image_shows_the_same_at_a_whole_fraction(kind, orientation, reduction):
    smooth = photo(6).resize((220, 180), Image.Resampling.BICUBIC)
    data = encode(smooth, kind, exif=exif(orientation))
    asked = []

    def allowed(height, width):
        asked.append((height, width))
        return reduction

    ours = decode(data, allowed)
    upright = (220, 180) if orientation == 6 else (180, 220)
    assert set(asked) == {upright}
    assert (ours.height, ours.width) == upright
    assert 1 <= ours.reduction <= reduction
    assert ours.pixels.shape[:2] == tuple(-(-side // ours.reduction) for side in upright)
    whole = Image.fromarray(pixels(data))
    small = whole.resize(ours.pixels.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(ours.pixels.astype(int) - np.asarray(small)).mean() < 4


def png_bomb():
    """A PNG that claims 20,000 x 20,000 px in some hundred bytes."""
    data = bytearray(encode(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"GIF89a" + bytes(100), "not an image of a kind we read"),
        (b"words, not pixels", "not an image of a kind we read"),
        (encode(photo(0), "JPEG")[:-200], "[Tt]runcated"),
        (encode(photo(0), "PNG")[:-300], "truncated|broken"),
        (encode(photo(0), "WEBP")[:-40], "decoder"),
        (encode(photo(0), "BMP")[:-100], "[Tt]runcated"),
        (encode(photo(0), "TIFF")[:-100], "."),
        (encode(photo(0), "JPEG")[:30], "not an image|[Tt]runcated"),
        (png_bomb(), "DecompressionBombError"),
    ],
)
def test_damaged_files_say_what_is_wrong(data, message):
    with pytest.raises(BadImageError, match=message):
        pixels(data)


def test_a_damaged_exif_block_does_not_cost_the_image():
    data = encode(photo(0), "JPEG", exif=b"Exif\0\0" + b"MM\0*\0\0\xff\xff" + bytes(40))
    assert pixels(data).shape == (48, 64, 3)
    data = encode(photo(0), "JPEG", exif=b"Exif\0\0" + bytes(range(40)))
    assert pixels(data).shape == (48, 64, 3)


# Not ru_maxrss: a process starts with the peak of the one that started it.
PEAK = """
import sys
from pathlib import Path
from msn.data.decode import decode, full_size
def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
data = open(sys.argv[1], "rb").read()
before = kilobytes("VmRSS")
shape = decode(data, full_size).pixels.shape
print(*shape, kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode", "orientation"),
    [
        *(("JPEG", "RGB", 1), ("JPEG", "CMYK", 6), ("PNG", "RGBA", 6)),
        *(("WEBP", "RGBA", 6), ("TIFF", "RGB", 1)),
    ],
)
def test_a_hundred_megapixels_peak_below_three_times_their_bytes(tmp_path, kind, mode, orientation):
    Image.new(mode, (12_000, 8_334)).save(tmp_path / "x", kind, exif=exif(orientation))
    run = [sys.executable, "-c", PEAK, str(tmp_path / "x")]
    out = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ).stdout
    height, width, channels, peak = map(int, out.split())
    assert (height, width) == ((12_000, 8_334) if orientation == 6 else (8_334, 12_000))
    assert channels == 3
    assert peak * 1024 < 3 * height * width * 3


def test_upright_photographs_do_not_need_pillow(monkeypatch):
    files = [encode(photo(2), "JPEG"), encode(photo(2), "JPEG", exif=exif(1))]
    theirs = np.asarray(Image.open(io.BytesIO(files[0])))
    monkeypatch.setattr(Image, "open", None)
    for data in files:
        assert np.array_equal(pixels(data), theirs)


def test_without_torchvisions_decoder_pillow_decodes(monkeypatch):
    data = encode(photo(2), "JPEG")
    monkeypatch.setattr(torch.ops, "image", object())
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


def exif_block(data):
    at = data.index(b"\xff\xe1")
    return data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]


def test_several_exif_blocks_are_read_as_pillow_reads_them():
    plain = encode(photo(2), "JPEG")
    upright, turned = (exif_block(encode(photo(2), "JPEG", exif=exif(o))) for o in (1, 6))
    for blocks in (upright + turned, turned + upright, upright + upright):
        data = plain[:2] + blocks + plain[2:]
        theirs = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert np.array_equal(pixels(data), theirs)
