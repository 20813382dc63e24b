"""Images that cannot be read: replaced, logged once, counted, listed in `bad_images.csv`.

All processes of a run share that file and count in it: a process that finds an unreadable image
appends it under a lock unless another process, or the run before a resume, has. So an image is
logged and counted once, without communication between processes.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from msn.errors import UserError

log = logging.getLogger(__name__)

COLUMNS = ("path", "reason", "image")  # the last is the number in the training set
_HEADER = (",".join(COLUMNS) + "\n").encode()

# How many may be unreadable unless `max_bad_fraction` is set.
_ALLOWED, _ALLOWED_SHARE = 10, 0.001


class BadImage(NamedTuple):
    """One image that could not be read: its number in the training set, its path, the reason."""

    number: int
    path: str
    reason: str


def strict_message(name: str, reason: object) -> str:
    """The message that ends a run with `data.strict=true`."""
    return (
        f"data.strict=true: {name} cannot be read ({reason}); "
        "data.strict=false replaces such images"
    )


class BadImageLedger:
    """Every unreadable image of a run, once.

    Args:
        num_images: number of indexed files, of which `max_fraction` is a share.
        max_fraction: share of them that may be unreadable, in [0, 1]; None allows ten images (half
            of fewer than 20), or 0.1 % if that is more.
        strict: whether the first unreadable image ends the run.

    Attributes:
        file: the `bad_images.csv` that all processes share; None counts in this process alone.
        known: unreadable images by number, of all processes as far as this one knows.

    Raises:
        UserError: `max_fraction` is outside [0, 1].
    """

    def __init__(self, *, num_images: int, max_fraction: float | None, strict: bool) -> None:
        if max_fraction is not None and not 0 <= max_fraction <= 1:
            raise UserError(f"data.max_bad_fraction={max_fraction}: must lie in [0, 1], or be null")
        self.num_images, self.max_fraction, self.strict = num_images, max_fraction, strict
        self.known: dict[int, BadImage] = {}
        self.file: Path | None = None
        self._unwritten: dict[int, BadImage] = {}
        self._read_to = 0

    def add(self, images: Iterable[BadImage]) -> list[BadImage]:
        """Record unreadable images; log, write and return those that are new to all processes."""
        fresh = {image.number: image for image in images if image.number not in self.known}
        if not fresh:
            return []
        if self.file is None:
            return self._take(fresh)
        new: list[BadImage] = []
        try:
            with self._locked(self.file) as file:
                self._read_others(file)
                new = self._take(fresh)
                file.write(_rows(self._unwritten.values()))
                file.flush()
                self._unwritten = {}
                self._read_to = file.tell()
        except OSError as error:
            log.warning("cannot write %s: %s", self.file, error.strerror or error)
            new = new or self._take(fresh)
        return new

    def knows(self, path: str) -> bool:
        """Whether the image of this name is known to be unreadable."""
        return any(image.path == path for image in self.known.values())

    def check(self) -> None:
        """Check the number of unreadable images of all processes.

        Raises:
            UserError: more than the allowed share is unreadable, or any image if strict.
        """
        count = len(self.known)
        if count == 0:
            return
        first = next(iter(self.known.values()))
        if self.strict:
            raise UserError(strict_message(first.path, first.reason))
        if count > self._allowed():
            share = "null" if self.max_fraction is None else f"{self.max_fraction:g}"
            listed = f", see {self.file}" if self.file is not None else ""
            raise UserError(
                f"data.max_bad_fraction={share}: {count} of {self.num_images} images "
                f"cannot be read, {int(self._allowed())} may{listed}; for instance {first.path} "
                f"({first.reason})"
            )

    def _allowed(self) -> float:
        """How many images may be unreadable."""
        if self.max_fraction is not None:
            return self.max_fraction * self.num_images
        return max(_ALLOWED_SHARE * self.num_images, min(_ALLOWED, self.num_images // 2))

    def forget(self, readable: Callable[[BadImage], bool]) -> None:
        """Remove from the file what an earlier start of the run could not read and this one can.

        Called before training by one process, when no process has read the file yet.
        """
        if self.file is None or not self.file.is_file():
            return
        try:
            with self._locked(self.file) as file:
                listed = list(_parse(file, 0))
                kept = [image for image in listed if not readable(image)]
                if len(kept) < len(listed):
                    file.truncate(0)
                    file.write(_HEADER + _rows(kept))
                    log.info(
                        "%d of %d images in %s can be read again",
                        *(len(listed) - len(kept), len(listed), self.file),
                    )
        except OSError as error:
            log.warning("cannot write %s: %s", self.file, error.strerror or error)

    def _take(self, fresh: dict[int, BadImage]) -> list[BadImage]:
        new = [image for number, image in fresh.items() if number not in self.known]
        for image in new:
            self.known[image.number] = self._unwritten[image.number] = image
            log.warning("replaced an unreadable image: %s (%s)", image.path, image.reason)
        return new

    @staticmethod
    @contextlib.contextmanager
    def _locked(path: Path) -> Iterator[BinaryIO]:
        with path.open("a+b") as file:
            with contextlib.suppress(OSError):  # a file system without locks: a row may come twice
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file  # closing it unlocks

    def _read_others(self, file: BinaryIO) -> None:
        """Learn what others have written since; leaves the file at its end."""
        for image in _parse(file, self._read_to):
            self.known.setdefault(image.number, image)
        if file.tell() == 0:
            file.write(_HEADER)


def _parse(file: BinaryIO, begin: int) -> Iterator[BadImage]:
    """The rows from a byte on; leaves the file at its end, after a whole row."""
    file.seek(begin)
    data = file.read()
    whole = data[: data.rfind(b"\n") + 1]  # the last writer may have been killed in a row
    if len(whole) < len(data):
        file.write(b"\n")
    for row in csv.reader(io.StringIO(os.fsdecode(whole), newline="")):
        if len(row) == len(COLUMNS) and row[2].isdigit():
            yield BadImage(int(row[2]), row[0], row[1])


def _rows(images: Iterable[BadImage]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for image in images:
        writer.writerow((image.path, " ".join(image.reason.split()), image.number))
    return os.fsencode(text.getvalue())
