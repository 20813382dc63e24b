"""A reader of the headers of one tar shard: its samples, as in WebDataset, and any damage.

`tarfile` allocates as much memory as a header claims, goes backwards at a negative size, and
recurses when one long name follows another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from msn.data.index import system_name
from msn.data.layout import UNLABELLED
from msn.errors import UserError
from msn.images.kinds import SUFFIXES

NO_CLASS = -2  # no .cls member, or no number in it; UNLABELLED is the number -1 in it
_LARGEST_META = 1 << 20  # bytes of a long name or of a PAX header
_LOOKED_BEHIND = 64 << 20  # bytes after the end of an archive that are checked for another one
_MOST_CLASSES = 1 << 31  # a greater number in a .cls member is a mistake
_LONGEST_NUMBER = 32  # bytes of a .cls member
_BLOCK = 512
_CHUNK = 1 << 20  # bytes read at a time

# Kinds of members, as the byte in their header says.
_FILES, _LINKS, _SPARSE = (b"0", b"\0", b"7"), (b"1", b"2"), b"S"
_WITHOUT_DATA = (*_LINKS, b"3", b"4", b"5", b"6")  # devices, folders, pipes
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"L", b"K", (b"x", b"X"), b"g"
_META = (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_OF_ALL)  # they describe the next member

_IS_SPARSE = "a sparse file, whose bytes are not as they are read"
_WRONG_SIZE = "the size of a member is not a number >= 0"


class ShardImage(NamedTuple):
    """One image in a shard."""

    offset: int  # in bytes
    size: int  # in bytes
    label: int  # class number, UNLABELLED or NO_CLASS
    name: str  # of the member


class ShardContents(NamedTuple):
    """The images of a shard."""

    images: list[ShardImage]  # one per sample, in the order of the members
    further: int  # skipped images in samples that have an image already
    links: int  # skipped images that are links to others
    damage: str | None  # first byte that cannot be read, and why; None if the shard is whole


class _Member(NamedTuple):
    """A member of a tar file."""

    name: str
    kind: bytes
    offset: int  # byte where its data begin
    size: int  # of its data in bytes


class _Damage(Exception):
    """The shard is damaged from this byte on."""

    def __init__(self, at: int, why: str) -> None:
        super().__init__(f"byte {at} ({why})")


def read_shard(path: str) -> ShardContents:
    """List the images of one uncompressed tar file, up to the first damage.

    Raises:
        UserError: it is not an uncompressed tar file.
        OSError: it cannot be read.
    """
    samples = _Samples()
    damage = None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        first = os.pread(descriptor, _BLOCK, 0)
        if not _is_header(first) and (first.strip(b"\0") or not first):
            raise UserError(f"{path}: is not an uncompressed tar file")
        for member in _members(descriptor):
            samples.add(descriptor, member)
    except _Damage as found:
        damage = str(found)
    finally:
        os.close(descriptor)
    samples.close(cut_off=damage is not None)
    return ShardContents(samples.images, samples.further, samples.links, damage)


def member_name(name: str) -> str:
    """A name inside a shard, without leading slashes, `.` and `..`."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


class _Samples:
    """Groups members into samples: a run of members with the same name up to the first dot."""

    def __init__(self) -> None:
        self.images: list[ShardImage] = []
        self.further = self.links = 0
        self._had_number = False
        self._begin("")

    def _begin(self, key: str) -> None:
        self._key, self._label = key, NO_CLASS
        self._extensions: set[str] = set()
        self._found: list[tuple[int, ShardImage]] = []

    def add(self, descriptor: int, member: _Member) -> None:
        """Add the next member of the shard.

        A repeated extension begins a new sample of the same name, so no image is lost.
        """
        name = member_name(member.name)
        folder, slash, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        is_image = f".{extension}".endswith(SUFFIXES)
        if member.kind not in (*_FILES, *_LINKS) or any(map(system_name, name.split("/"))):
            return
        if member.kind in _LINKS:
            self.links += is_image
            return
        if key != self._key or extension in self._extensions:
            self.close()
            self._begin(key)
        self._extensions.add(extension)
        if extension == "cls":
            self._label = _read_label(descriptor, member)
        elif is_image:
            image = ShardImage(member.offset, member.size, NO_CLASS, name)
            self._found.append((len(extension), image))

    def close(self, *, cut_off: bool = False) -> None:
        """End the sample; of `1.jpg` and `1.seg.png` the first is its image.

        Args:
            cut_off: whether the shard is damaged after it, so that its class number may be lost: it
                is skipped if it has no number and the sample before has one.
        """
        if not self._found:
            return
        if cut_off and self._label == NO_CLASS and self._had_number:
            return
        image = min(self._found, key=lambda found: found[0])[1]
        self.images.append(image._replace(label=self._label))
        self._had_number = self._label != NO_CLASS
        self.further += len(self._found) - 1


def _read_label(descriptor: int, member: _Member) -> int:
    """The number in a `.cls` member, or NO_CLASS; _Damage if its block does not end in zeros."""
    if member.size > _LONGEST_NUMBER:
        return NO_CLASS
    block = os.pread(descriptor, _BLOCK, member.offset)
    if member.size and block[member.size :].strip(b"\0"):
        raise _Damage(member.offset, "another block where a class number should be")
    text = block[: member.size].strip()
    if text == b"%d" % UNLABELLED:
        return UNLABELLED
    number = int(text) if text.isdigit() else NO_CLASS
    return number if number < _MOST_CLASSES else NO_CLASS


def _members(descriptor: int) -> Iterator[_Member]:
    """The complete members of a tar file up to its end; _Damage if a block is not a member."""
    file_size = os.fstat(descriptor).st_size
    begin = at = 0  # a member begins with the first of the headers that describe it
    long_name, pax_size, is_link = None, None, False
    while (block := os.pread(descriptor, _BLOCK, at)).strip(b"\0"):
        name, kind, size = _header(block, begin)
        data = at + _BLOCK
        if kind in _WITHOUT_DATA:
            size = 0
        elif kind not in _META and pax_size is not None:
            size = pax_size
        if data + size > file_size:
            there = max(0, file_size - data)
            raise _Damage(begin, f"{_shown(name)} claims {size} bytes, {there} are there")
        if kind in _META and size > _LARGEST_META:
            raise _Damage(begin, f"a header claims {size} bytes")
        at = data + -(-size // _BLOCK) * _BLOCK
        if kind == _LONG_NAME:
            long_name = os.pread(descriptor, size, data).partition(b"\0")[0]
        elif kind in _PAX:
            path, pax_size = _read_pax(os.pread(descriptor, size, data), begin)
            long_name = path or long_name
        elif kind == _PAX_OF_ALL:
            if _read_pax(os.pread(descriptor, size, data), begin) != (None, None):
                raise _Damage(begin, "a header gives all members one name or size")
        elif kind == _LONG_LINK:
            is_link = True
        elif is_link and kind not in _LINKS:
            raise _Damage(begin, "a header describes a link, a file follows")
        else:
            whole = name if long_name is None else long_name
            if kind == b"\0" and whole.endswith(b"/"):  # how folders were written once
                kind = b"5"
            yield _Member(whole.decode("utf-8", "surrogateescape"), kind, data, size)
            begin, long_name, pax_size, is_link = at, None, None, False
    if begin != at:
        raise _Damage(begin, "the member that a header describes is missing")
    if not block:
        raise _Damage(min(at, file_size), "the end of the archive is missing, it may be cut off")
    _refuse_more(descriptor, at)


def _header(block: bytes, at: int) -> tuple[bytes, bytes, int]:
    """Name, kind and size of a header [512 bytes]; _Damage if it is none, or of a sparse file."""
    if not _is_header(block):
        raise _Damage(at, "no header of a member")
    name, kind, size = block[:100].partition(b"\0")[0], block[156:157], _number(block[124:136])
    if size is None or size < 0:
        raise _Damage(at, _WRONG_SIZE)
    if kind == _SPARSE:
        raise _Damage(at, _IS_SPARSE)
    if block[257:263] == b"ustar\0":  # others keep times where the POSIX format has a prefix
        prefix = block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name, kind, size


def _is_header(block: bytes) -> bool:
    """Whether the checksum is right; some programs sum signed bytes, some unsigned ones."""
    if len(block) < _BLOCK:
        return False
    said = _number(block[148:156])
    rest = block[:148] + b" " * 8 + block[156:]
    return said in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest))


def _number(field: bytes) -> int | None:
    """An octal number, or a binary one if the first bit is set; None for anything else."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    text = field.partition(b"\0")[0].strip()
    return None if text.strip(b"01234567") else int(text or b"0", 8)


def _read_pax(data: bytes, at: int) -> tuple[bytes | None, int | None]:
    """Path and size from the records `LENGTH KEY=VALUE` of a PAX header; None if absent."""
    path = size = None
    begin = 0
    while begin < len(data) and data[begin] != 0:
        length, _, _ = data[begin : begin + 8].partition(b" ")
        end = begin + int(length) if length.isdigit() else 0
        key, equals, value = data[begin + len(length) + 1 : max(0, end - 1)].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise _Damage(at, "a PAX header is damaged")
        if key.startswith(b"GNU.sparse"):
            raise _Damage(at, _IS_SPARSE)
        if key == b"path":
            path = value
        elif key == b"size":
            if not value.isdigit() or len(value) > _LONGEST_NUMBER:
                raise _Damage(at, _WRONG_SIZE)
            size = int(value)
        begin = end
    return path, size


def _shown(name: bytes) -> str:
    return ascii(name[:100].decode("utf-8", "surrogateescape"))


def _refuse_more(descriptor: int, end: int) -> None:
    """Raise _Damage if other bytes than zero follow the archive's end, which `tar` skips."""
    for at in range(end, end + _LOOKED_BEHIND, _CHUNK):
        chunk = os.pread(descriptor, _CHUNK, at)
        if rest := chunk.lstrip(b"\0"):
            found = at + len(chunk) - len(rest)
            raise _Damage(found, "something follows the archive's end, another one perhaps")
        if not chunk:
            return
