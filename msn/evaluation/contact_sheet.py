"""A sheet of numbered thumbnails, for a person who is about to label them."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_CELL = 112  # px, thumbnail and margin
_THUMBNAIL = 104
_CAPTION = 16
_COLUMNS = 10
_INK = (20, 20, 20)


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Lay images out in rows of ten, each above its caption, whole and in proportion.

    Args:
        images: RGB, of any size; small ones are enlarged without smoothing.
        captions: one a image, a few characters.
    """
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    height = _CELL + _CAPTION
    sheet = Image.new("RGB", (columns * _CELL, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        scale = _THUMBNAIL / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        left, top = i % columns * _CELL, i // columns * height
        offset = (left + (_CELL - size[0]) // 2, top + (_CELL - size[1]) // 2)
        sheet.paste(image.resize(size, filter_), offset)
        draw.text((left + _CELL / 2, top + _CELL), caption, fill=_INK, font=font, anchor="ma")
    return sheet
