"""What one tar shard holds: its samples, as WebDataset counts them, and where it is damaged."""

from __future__ import annotations

import os
import tarfile
from typing import NamedTuple

from msn.data.index import system_name
from msn.data.kinds import SUFFIXES
from msn.errors import UserError

NO_CLASS = -1
_MOST_CLASSES = 1 << 31  # a greater number in a .cls member is a mistake
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20  # bytes read at a time


class ShardImage(NamedTuple):
    """One image: byte offset and size in its shard, class number or NO_CLASS, member's name."""

    offset: int
    size: int
    label: int
    name: str


class ShardContents(NamedTuple):
    """What was found in a shard.

    Attributes:
        images: one a sample, in the order of the members.
        further: images that lie beside a chosen one in its sample.
        damage: from which byte on the shard cannot be read and why; None for a whole one.
    """

    images: list[ShardImage]
    further: int
    damage: str | None


def read_shard(path: str) -> ShardContents:
    """List the images of one uncompressed tar file; of a damaged one those before the damage.

    Raises:
        UserError: it is no uncompressed tar file.
    """
    samples = _Samples()
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    samples.add(tar, member)
                damage = _unread(path, tar.offset)
            except tarfile.TarError as error:
                damage = f"byte {min(tar.offset, os.path.getsize(path))} ({error})"
    except tarfile.TarError as error:
        raise UserError(f"{path}: is no uncompressed tar file ({error})") from None
    samples.close()
    return ShardContents(samples.images, samples.further, damage)


class _Samples:
    """Puts members together to samples: a run of members whose names up to the first dot agree."""

    def __init__(self) -> None:
        self.images: list[ShardImage] = []
        self.further = 0
        self._begin("")

    def _begin(self, key: str) -> None:
        self._key, self._label = key, NO_CLASS
        self._extensions: set[str] = set()
        self._found: list[tuple[int, ShardImage]] = []

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Take the next member of the shard.

        An extension that is there already begins a sample of the same name, so nothing is lost.
        """
        folder, slash, file = member.name.removeprefix("./").rpartition("/")
        if not member.isreg() or _is_system(member.name):
            return
        stem, _, extension = file.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if key != self._key or extension in self._extensions:
            self.close()
            self._begin(key)
        self._extensions.add(extension)
        if extension == "cls":
            self._label = _read_label(tar, member)
        elif f".{extension}".endswith(SUFFIXES):
            name = folder + slash + file
            image = ShardImage(member.offset_data, member.size, NO_CLASS, name)
            self._found.append((len(extension), image))

    def close(self) -> None:
        """End the sample: `1.jpg` is its image, `1.seg.png` what somebody made of it."""
        if self._found:
            image = min(self._found, key=lambda found: found[0])[1]
            self.images.append(image._replace(label=self._label))
            self.further += len(self._found) - 1


def _is_system(name: str) -> bool:
    """Whether a member lies in a folder, or is a file, that is no image in a folder either."""
    return any(system_name(part) for part in name.split("/") if part not in (".", ".."))


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = tar.extractfile(member)
    text = file.read(32).strip() if file is not None else b""
    number = int(text) if text.isdigit() else NO_CLASS
    return number if number < _MOST_CLASSES else NO_CLASS


def _unread(path: str, end: int) -> str | None:
    """What `tarfile` passes over silently: bytes that are not zero where it found the end.

    Args:
        path: the shard.
        end: byte where the next header was looked for.
    """
    with open(path, "rb") as file:
        at = file.seek(end)
        while chunk := file.read(_CHUNK):
            rest = chunk.lstrip(b"\0")
            if rest:
                found = at + len(chunk) - len(rest)
                if found < end + _BLOCK:  # an end mark would be a block of zeros
                    return f"byte {end} (no header of a member)"
                return f"byte {found} (something follows the archive's end, another one perhaps)"
            at += len(chunk)
    return None
