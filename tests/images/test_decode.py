"""Every kind of file becomes the upright RGB pixels it shows; damaged ones say what is wrong."""

import io
import os
import socket
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from msn.images import decode as decoding
from msn.images.decode import decode, extremes, full_size
from msn.images.kinds import FORMATS, BadImageError, read_file
from tests.data.photos import photo
from tests.data.tiffs import deep_png, tiff


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


@pytest.mark.parametrize("kind", FORMATS)
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
        theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError:
        pytest.skip(f"no {kind} holds {mode}, or this Pillow cannot read what it wrote")
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


TWELVE = (0, 4095)
CT = (-1024, 3071)


def spread(low, high, channels, dtype=np.uint16):
    """All of a range, from its least to its greatest value, in no order."""
    values = np.linspace(low, high, 6 * 7 * channels).astype(np.int64)
    values = np.random.default_rng(0).permutation(values).reshape(6, 7, channels)
    return (values if channels > 1 else values[..., 0]).astype(dtype)


def as_rgb(values):
    """Gray, gray with alpha, RGB and RGBA as three channels."""
    if values.ndim == 2:
        values = values[..., None]
    return np.repeat(values[..., :1], 3, 2) if values.shape[2] < 3 else values[..., :3]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_twelve_bits_in_a_png_of_sixteen_use_all_gray_levels(channels):
    values = spread(0, 4095, channels)
    data = deep_png(values)
    assert np.array_equal(decode(data, full_size, TWELVE).pixels, as_rgb(values) >> 4)
    assert np.array_equal(pixels(data), as_rgb(values) >> 8)
    shown = as_rgb(values)
    assert extremes(data) == (shown.min(), shown.max())


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_twelve_bits_in_a_tiff_of_sixteen_use_all_gray_levels(order, deflated, channels):
    values = spread(0, 4095, channels)
    data = tiff(values, order, deflated=deflated)
    assert np.array_equal(decode(data, full_size, TWELVE).pixels, as_rgb(values) >> 4)
    assert np.array_equal(pixels(data), as_rgb(values) >> 8)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32])
def test_signed_and_32_bit_tiffs_are_read_in_both_byte_orders(order, deflated, dtype):
    low = 2**32 - 4096 if dtype == np.uint32 else CT[0]
    values = spread(low, low + 4095, 1, dtype)
    data = tiff(values, order, deflated=deflated)
    ours = decode(data, full_size, (low, low + 4095)).pixels
    assert np.array_equal(ours, as_rgb(values.astype(np.int64) - low) >> 4)
    assert extremes(data) == (low, low + 4095)


def test_values_beyond_the_levels_are_black_and_white():
    values = np.array([[-3000, -1024, 3071, 30_000]], np.int16)
    assert decode(tiff(values), full_size, CT).pixels[0, :, 0].tolist() == [0, 0, 255, 255]


def test_deep_images_are_turned_and_reduced_and_read_in_strips(monkeypatch):
    values = spread(0, 4095, 3)
    data = encode(Image.open(io.BytesIO(deep_png(values))), "PNG", exif=exif(6))  # 8 bits
    turned = deep_png(values, exif=data)
    whole = decode(turned, full_size, TWELVE).pixels
    assert np.array_equal(whole, np.rot90(values >> 4, -1))
    monkeypatch.setattr(decoding, "_STRIP_PIXELS", 14)
    assert np.array_equal(decode(turned, full_size, TWELVE).pixels, whole)
    assert decode(turned, lambda height, width: 2, TWELVE).pixels.shape == (4, 3, 3)


def test_images_of_eight_bits_have_no_extremes_and_no_levels():
    for kind in FORMATS:
        data = encode(photo(1), kind)
        assert extremes(data) is None
        assert np.array_equal(decode(data, full_size, TWELVE).pixels, pixels(data))


UNREAD_TIFFS = {
    "32-bit floating-point": tiff(np.ones((4, 5), np.float32)),
    "64-bit floating-point": tiff(np.ones((4, 5), np.float64), ">"),
    "16-bit floating-point": tiff(np.ones((4, 5, 3), np.float16)),
    "5 bands": tiff(np.ones((4, 5, 5), np.uint8)),
    "6 bands": tiff(np.ones((4, 5, 6), np.uint16)),
    "signed 8-bit": tiff(np.ones((4, 5), np.int8)),
    "16-bit colours in planes": tiff(np.ones((4, 5, 3), np.uint16), planes=True),
    "2 x 16 bits is not read": tiff(np.ones((4, 5, 2), np.uint16)),
}


@pytest.mark.parametrize("reason", UNREAD_TIFFS)
def test_tiffs_that_are_not_read_say_why(reason):
    with pytest.raises(BadImageError, match=reason):
        pixels(UNREAD_TIFFS[reason])


def test_of_an_animation_the_first_picture_is_taken():
    first, second = photo(1).convert("P"), photo(2).convert("P")
    data = encode(first, "GIF", save_all=True, append_images=[second], duration=100)
    assert np.array_equal(pixels(data), np.asarray(first.convert("RGB")))


def test_heic_without_its_package_says_what_to_install(monkeypatch):
    from msn.images import kinds

    monkeypatch.setattr(kinds, "_HEIF", ())
    monkeypatch.setattr(kinds, "FORMATS", ("JPEG", "PNG"))
    with pytest.raises(BadImageError, match="pip install pillow-heif"):
        pixels(b"\0\0\0\x18ftypheic" + bytes(40))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("BMP", "GIF")])
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
        (b"8BPS" + bytes(100), "not an image of a kind we read"),
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


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_damaged_exif_block_leaves_the_image_as_it_is(kind):
    data = encode(photo(0), kind, exif=exif(6), **({"lossless": True} if kind == "WEBP" else {}))
    upright = encode(photo(0), kind, **({"lossless": True} if kind == "WEBP" else {}))
    if kind == "TIFF":
        tag = data.index(b"\x12\x01\x03\x00")
        damaged = data[: tag + 8] + b"\xff\xff" + data[tag + 10 :]
    else:
        block = exif(6).tobytes()
        block = block if block in data else block.removeprefix(b"Exif\0\0")
        assert block in data
        damaged = data.replace(block, b"not a TIFF file".ljust(len(block), b"\0"))
        if kind == "PNG":
            damaged = with_checksums(damaged)
    assert np.array_equal(pixels(damaged), pixels(upright))


def with_checksums(png):
    """A PNG whose chunks were changed, with the right checksums."""
    import zlib

    out, at = bytearray(png[:8]), 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        chunk = png[at + 4 : at + 8 + length]
        out += png[at : at + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        at += 12 + length
    return bytes(out)


def test_a_png_with_a_large_profile_and_a_large_text_is_read():
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("XML", "x" * 3_000_000, zip=True)
    data = encode(photo(0), "PNG", icc_profile=bytes(3_000_000), pnginfo=text)
    assert np.array_equal(pixels(data), np.asarray(photo(0)))


def test_an_image_that_does_not_fit_into_memory_is_a_bad_one(monkeypatch):
    def refuse(*_, **__):
        raise MemoryError

    data = encode(photo(0), "PNG", exif=exif(6))
    for where in ("_in_strips", "_turned", "open_image"):
        with monkeypatch.context() as patch:
            patch.setattr(decoding, where, refuse)
            with pytest.raises(BadImageError, match="does not fit into memory"):
                pixels(data)


def test_only_regular_files_below_a_gibibyte_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate((1 << 30) + 1)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jpg"))
        for name in ("pipe.jpg", "zero.jpg", "huge.jpg", "socket.jpg", ".", "gone.jpg"):
            with pytest.raises(BadImageError):
                read_file(tmp_path / name)
    with pytest.raises(BadImageError, match="not a regular file"):
        read_file(tmp_path / "pipe.jpg")
    with pytest.raises(BadImageError, match="above 1 GiB"):
        read_file(tmp_path / "huge.jpg")


def test_what_pillow_warns_of_is_counted_and_not_printed(caplog, monkeypatch):
    monkeypatch.setattr(decoding, "_warned", Counter())
    odd = encode(photo(0), "JPEG", exif=b"Exif\0\0" + b"MM\0*\0\0\xff\xff" + bytes(40))
    caplog.set_level("INFO", "msn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(25):
            pixels(odd)
    counts = [record.args[0] for record in caplog.records]
    assert counts == [1, 10]


# Not ru_maxrss: a process starts with the peak of the one that started it.
PEAK = """
import sys
from pathlib import Path
from msn.images.decode import decode, full_size
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
