"""TIFFs and PNGs of kinds that Pillow does not write."""

import io
import struct
import zlib

from PIL import Image

_KINDS = {"u": 1, "i": 2, "f": 3}


def tiff(values, order="<", *, planes=False, deflated=False):
    """A TIFF of [h, w] or [h, w, c] in either byte order, its channels together or in planes."""
    height, width, *more = values.shape
    count = more[0] if more else 1
    stored = values.astype(values.dtype.newbyteorder(order)).reshape(height, width, count)
    parts = [stored[..., i].tobytes() for i in range(count)] if planes else [stored.tobytes()]
    if deflated:
        parts = [zlib.compress(part) for part in parts]
    entries = {
        256: [width],
        257: [height],
        258: [8 * values.dtype.itemsize] * count,
        259: [8 if deflated else 1],
        262: [1 if count < 3 else 2],
        273: [0] * len(parts),  # where the parts are, below
        277: [count],
        278: [height],
        279: [len(part) for part in parts],
        284: [2 if planes else 1],
        338: [0] * (count - (1 if count < 3 else 3)),
        339: [_KINDS[values.dtype.kind]] * count,
    }
    entries = {tag: numbers for tag, numbers in entries.items() if numbers}
    after = 8 + 2 + 12 * len(entries) + 4
    at = after + sum(4 * len(numbers) for numbers in entries.values() if len(numbers) > 1)
    for i, part in enumerate(parts):
        entries[273][i] = at
        at += len(part)
    directory, beside = struct.pack(order + "H", len(entries)), b""
    for tag, numbers in entries.items():
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        value = packed if len(numbers) == 1 else struct.pack(order + "I", after + len(beside))
        beside += packed if len(numbers) > 1 else b""
        directory += struct.pack(order + "HHI", tag, 4, len(numbers)) + value
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return start + directory + bytes(4) + beside + b"".join(parts)


def deep_png(values, exif=None):
    """A 16-bit PNG of [h, w] or [h, w, c]; with the EXIF block of another PNG, if given."""
    height, width, *more = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[more[0] if more else 1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    if exif is not None:
        block = Image.open(io.BytesIO(exif)).info["exif"]
        chunks.append((b"eXIf", block.removeprefix(b"Exif\0\0")))
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
