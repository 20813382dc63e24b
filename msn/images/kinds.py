"""Opening of image files: the formats that are read, and why others are not."""

from __future__ import annotations

import errno
import importlib
import os
import stat
from io import BytesIO
from typing import Any

from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin, features

from msn.files import TOO_MANY_OPEN

MOST_BYTES = 1 << 30  # of a file: Pillow's greatest image takes as much with 16 bits per channel


class BadImageError(Exception):
    """An image that cannot be read; the message is the reason, without the path."""


def _has_heif() -> bool:
    """Whether pillow-heif is installed; it then gives Pillow its decoder."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except (ImportError, OSError):
        return False
    return True


_AVIF = (".avif",) if "avif" in features.modules and features.check("avif") else ()
_HEIF = (".heic", ".heif") if _has_heif() else ()
FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"),
    *(kind for kind, there in (("AVIF", _AVIF), ("HEIF", _HEIF)) if there),
)
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", *_AVIF, *_HEIF),
)
# Images of other kinds: skipped, but reported.
UNREAD_SUFFIXES = tuple(
    suffix
    for suffix in (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".psd")
    if suffix not in SUFFIXES
)

# Profiles and texts of cameras and editors are larger than the 1 MB that Pillow allows.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 1 << 24)
# Pillow reads unsigned 32-bit TIFFs of one byte order only.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 1, (1,), 1, (32,), ()), ("I", "I;32B"))
# libtiff returns numbers in the machine's byte order, which Pillow overlooks for these.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "I;32B": "I;32N"}
_SAMPLE_FORMAT, _SIGNED, _FLOAT, _COMPLEX = 339, 2, 3, (5, 6)  # of a TIFF


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file; pipes, sockets and devices, which may never end, are refused.

    Raises:
        BadImageError: it is not a regular file, larger than 1 GiB or than the memory, or cannot be
            read.
        OSError: too many files are open, or memory is short.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("not a regular file")
            if status.st_size > MOST_BYTES:
                raise BadImageError(f"{status.st_size} bytes: files above 1 GiB are not read")
            return file.read()
    except OSError as error:
        raise unreadable(error) from error
    except MemoryError:
        raise BadImageError("does not fit into memory") from None


def unreadable(error: OSError, where: str = "") -> BadImageError:
    """The reason why the bytes of an image cannot be read, as an exception to raise.

    Args:
        error: of the system.
        where: the file, if it is not the image's own.

    Raises:
        OSError: the image is not to blame: too many files are open, or memory is short.
    """
    if error.errno in (*TOO_MANY_OPEN, errno.ENOMEM):
        raise error
    reason = error.strerror or type(error).__name__
    return BadImageError(f"{where}: {reason}" if where else reason)


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a writer of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_image(data: bytes) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        BadImageError: it is of a kind that is not read.
        Exception: anything, if the file is damaged.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BadImageError(_why_unidentified(data)) from None
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        reason = _why_not(image.tag_v2)
        if reason is not None:
            raise BadImageError(reason)
        image.tile = [_in_native_order(tile) for tile in image.tile]
    return image


def _in_native_order(tile: ImageFile._Tile) -> ImageFile._Tile:
    kind, extents, offset, arguments = tile
    if kind != "libtiff" or not isinstance(arguments, tuple):
        return tile
    raw_mode, *more = arguments
    return ImageFile._Tile(kind, extents, offset, (_NATIVE.get(raw_mode, raw_mode), *more))


def _why_not(tags: Any) -> str | None:
    """Why a TIFF with these tags is not read, although Pillow might; None if it is."""
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    samples = int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    kinds = tags.get(_SAMPLE_FORMAT, (1,))
    if _FLOAT in kinds:
        return f"{bits}-bit floating-point pixels have no agreed range; store 8 or 16 bits"
    if any(kind in kinds for kind in _COMPLEX):
        return f"{bits}-bit complex pixels are not read"
    if samples > 4:
        return f"a TIFF of {samples} bands: store the three that are red, green and blue"
    if _SIGNED in kinds and bits <= 8:
        return "signed 8-bit pixels are not read; store unsigned or 16 bits"
    if bits > 8 and samples > 1 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2:
        return f"{bits}-bit colours in planes apart are not read; store them interleaved"
    return None


def _why_unidentified(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        if not _HEIF:
            return "HEIC is read where pillow-heif is installed (pip install pillow-heif)"
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if b"+" in data[:4] else 8])
            stream = BytesIO(data)
            stream.seek(tags.next)
            tags.load(stream)
            samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
            bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
            return _why_not(tags) or f"a TIFF of {samples} x {bits} bits is not read"
        except Exception:  # it raises anything on damaged files
            pass
    return f"not an image of a kind we read ({', '.join(FORMATS)})"
