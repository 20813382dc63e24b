"""The batched back end on a CPU: some views at a time, alike in the order of their changes.

On a CPU a change costs little arithmetic, but every call costs microseconds and fresh memory costs
more than the arithmetic. So views that are changed in the same order are sorted side by side, cut
into one buffer some at a time, changed there in place and written out once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from msn.data.blur import PASSES, blur_matrices, blur_taps, box_radius
from msn.data.collate import ImageBatch
from msn.data.colour import (
    HUE_PLANES,
    blend,
    channels_of,
    gray_image,
    mean_gray,
    turn_hue,
    whole_turns,
)
from msn.data.crops import resize
from msn.data.views import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FACTORS,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_ORDERS,
    NO_CHANGE,
)

_ORDER, _GRAY, _BLUR = (COLUMNS.index(name) for name in ("order", "gray", "blur"))
_SCALE = [1 / (255 * std) for std in IMAGENET_STD]
_SHIFT = [torch.tensor(-m / s) for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
_CHUNK_PIXELS = 1 << 18  # of the views that are made together; best of 2**14 to 2**18
# Most of a blur's matrix is zero; in strips, which pays for large views alone, less of it counts.
_WHOLE_BLUR_UP_TO = 128  # px
_STRIPS = 4


def make_chunk_by_chunk(
    batch: ImageBatch, views: slice, size: int, *, greatest_blur: float
) -> Tensor:
    """Cut, recolour, blur and normalise views of one size, uint8 in, float32 out.

    Args:
        batch: decoded images with parameters, on the CPU.
        views: which rows of the table.
        size: side of the views in px.
        greatest_blur: greatest radius in px.

    Returns:
        Normalised views, float32 [v, B, 3, size, size].
    """
    table = batch.table[views]
    rows = table.reshape(-1, len(COLUMNS))
    chunks = list(_chunks(rows.numpy(), max(1, _CHUNK_PIXELS // size**2)))
    order = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
    cut = _cut(batch, table, order, size)
    rows = rows[order]
    taps = torch.from_numpy(blur_taps(rows[:, _BLUR].numpy(), greatest_blur))
    # NumPy asks the kernel for huge pages; the first touch of others takes a third of all the time.
    out = torch.from_numpy(np.empty((len(rows), 3, size, size), np.float32))
    bench = _Workbench(size)
    at = 0
    for chunk in chunks:
        part = slice(at, at + len(chunk))
        bench.change(cut[part], rows[part], taps[part])
        bench.put(out, torch.from_numpy(chunk))
        at = part.stop
    return out.view(*table.shape[:2], 3, size, size)


def _chunks(rows: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Numbers of the views that are made together: alike in the order of their changes."""
    column = dict(zip(COLUMNS, rows.T, strict=True))
    jittered = (rows[:, FACTORS] != NO_CHANGE).any(1)
    kind = np.where(jittered, column["order"], -1)
    order = np.lexsort((column["gray"], column["blur"] > 0, kind))
    ends = np.flatnonzero(np.diff(kind[order], append=np.inf)) + 1
    begin = 0
    for end in ends.tolist():
        for at in range(begin, end, most):
            yield order[at : min(at + most, end)]
        begin = end


def _cut(batch: ImageBatch, table: Tensor, order: np.ndarray, size: int) -> Tensor:
    """Cut all views, image by image while each is in the cache; they lie in the given order."""
    num_views, count = table.shape[:2]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    slots = torch.from_numpy(np.empty((len(order), 3, size, size), np.uint8))
    boxes = table[..., :5].long().tolist()
    for item in range(count):
        image = batch.image(item).numpy()
        for view in range(num_views):
            top, left, height, width, flip = boxes[view][item]
            resized = resize(image[top : top + height, left : left + width], size)
            slots[place[view * count + item]] = resized.flip(-1) if flip else resized
    return slots


class _Space:
    """Views of the workbench for so many views at a time; making them anew would cost calls."""

    def __init__(self, count: int, size: int) -> None:
        self.pixels = torch.empty(count, 3, size, size)
        self.channels = channels_of(self.pixels)
        self.scratch = torch.empty(HUE_PLANES, count, 1, size, size)
        self.planes = self.scratch.unbind()


class _Workbench:
    """The memory in which some views at a time are made."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._spaces: dict[int, _Space] = {}

    def change(self, cut: Tensor, rows: Tensor, taps: Tensor) -> None:
        """Jitter, gray and blur cut views uint8 [n, 3, size, size] by their rows of the table."""
        count = len(rows)
        if count not in self._spaces:
            self._spaces[count] = _Space(count, self.size)
        self.space = self._spaces[count]
        self.space.pixels.copy_(cut)
        values = rows.numpy()
        if (values[:, FACTORS] != NO_CHANGE).any():
            for change in JITTER_ORDERS[int(values[0, _ORDER])].tolist():
                self._jitter(change, rows[:, FACTORS[change]])
        for begin, end in _runs(values[:, _GRAY]):
            part = self.space.pixels[begin:end]
            gray = gray_image(channels_of(part), out=self.space.planes[0][begin:end])
            part.copy_(gray)
        for begin, end in _runs(values[:, _BLUR]):
            self._blur(begin, end, taps[begin:end], values[begin:end, _BLUR].max())

    def put(self, out: Tensor, numbers: Tensor) -> None:
        """Normalise, and write the views to their places in `out`."""
        single = len(numbers) == 1
        target = channels_of(out[numbers[0]][None]) if single else self.space.channels
        for channel, plane in enumerate(self.space.channels):
            torch.add(_SHIFT[channel], plane, alpha=_SCALE[channel], out=target[channel])
        if not single:
            out.index_copy_(0, numbers, self.space.pixels)

    def _jitter(self, change: int, factors: Tensor) -> None:
        if (factors.numpy() == NO_CHANGE[change]).all():
            return
        pixels, channels, planes = self.space.pixels, self.space.channels, self.space.planes
        # One number for all pixels saves a pass over them.
        factor = float(factors[0]) if len(factors) == 1 else factors.view(-1, 1, 1, 1)
        if change == HUE:
            turn_hue(pixels, channels, whole_turns(factor), planes)
        elif change == BRIGHTNESS:
            blend(pixels, 0.0, factor)
        elif change == CONTRAST:
            blend(pixels, mean_gray(pixels), factor)
        else:
            blend(pixels, gray_image(channels, out=planes[0]), factor)

    def _blur(self, begin: int, end: int, taps: Tensor, greatest: float) -> None:
        """Blur views `begin` to `end` in place: rows into scratch, columns back."""
        count, size = end - begin, self.size
        matrix = blur_matrices(taps, size)
        views = self.space.pixels[begin:end]
        rows = self.space.scratch.flatten()[: views.numel()].view(views.shape)
        strip = size if size <= _WHOLE_BLUR_UP_TO else -(-size // _STRIPS)
        reach = PASSES * math.ceil(box_radius(np.array(greatest)))
        strips = [
            (slice(at, min(at + strip, size)), slice(max(0, at - reach), at + strip + reach))
            for at in range(0, size, strip)
        ]
        lines, blurred = views.view(count, -1, size), rows.view(count, -1, size)
        for to, near in strips:
            torch.bmm(lines[..., near], matrix[:, to, near].mT, out=blurred[..., to])
        for to, near in strips:
            across = matrix[:, to, near]
            if count == 1:
                torch.bmm(across.expand(3, -1, -1), rows[0, :, near], out=views[0, :, to])
                continue
            for channel in range(3):
                torch.bmm(across, rows[:, channel, near], out=views[:, channel, to])


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of every run that is not 0."""
    steps = np.flatnonzero(np.diff(flags > 0, prepend=False, append=False)).tolist()
    return list(zip(steps[::2], steps[1::2], strict=True))
