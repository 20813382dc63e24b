"""What happens to images that cannot be read: replaced, logged once, counted, written down."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from msn.data.collate import BadImage
from msn.errors import UserError

log = logging.getLogger(__name__)


class BadImageLedger:
    """Every unreadable image of a run, once.

    Args:
        num_images: size of the training set that the images come from.
        max_fraction: share of the set that may be unreadable, in [0, 1].
        strict: whether the first unreadable image ends the run.

    Raises:
        UserError: `max_fraction` is outside [0, 1].
    """

    def __init__(self, *, num_images: int, max_fraction: float, strict: bool) -> None:
        if not 0 <= max_fraction <= 1:
            raise UserError(f"data.max_bad_fraction={max_fraction}: must lie in [0, 1]")
        self.num_images, self.max_fraction, self.strict = num_images, max_fraction, strict
        self.known: dict[int, BadImage] = {}
        self.file: Path | None = None
        self._written: set[int] = set()

    def add(self, images: Iterable[BadImage]) -> list[BadImage]:
        """Take note of unreadable images and log those not seen before.

        Returns:
            The new ones.
        """
        new = []
        for image in images:
            if image.index not in self.known:
                self.known[image.index] = image
                new.append(image)
                log.warning("replaced an unreadable image: %s (%s)", image.path, image.reason)
        return new

    def write(self) -> None:
        """Append what is not yet in the file to `bad_images.csv`, where one is set."""
        rows = [image for index, image in self.known.items() if index not in self._written]
        if self.file is None or not rows:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.file.exists():
            writer.writerow(("path", "reason"))
        writer.writerows((image.path, image.reason) for image in rows)
        data = os.fsencode(text.getvalue())
        try:
            with self.file.open("ab") as file:
                file.write(data)
        except OSError as error:
            log.warning("cannot write %s: %s", self.file, error)
            return
        self._written |= {image.index for image in rows}

    def check(self) -> None:
        """End the run where too much is unreadable.

        Raises:
            UserError: more than the allowed share, or anything at all if strict.
        """
        count = len(self.known)
        if count and self.strict:
            first = next(iter(self.known.values()))
            raise UserError(
                f"data.strict=true: {first.path} cannot be read ({first.reason}); "
                "data.strict=false replaces such images"
            )
        if count > self.max_fraction * self.num_images:
            listed = f", see {self.file}" if self.file is not None else ""
            first = next(iter(self.known.values()))
            raise UserError(
                f"data.max_bad_fraction={self.max_fraction:g}: {count} of {self.num_images} images "
                f"cannot be read{listed}; for instance {first.path} ({first.reason})"
            )
