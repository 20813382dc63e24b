"""The cache of indexes: tables kept between runs until the files they were read from change.

A table is a file of arrays that every process maps into memory. Strings are one block of bytes with
an array of offsets, so a million of them load in milliseconds and all processes share the pages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np

from msn.files import write_atomically
from msn.images.kinds import SUFFIXES

log = logging.getLogger(__name__)

_FORMAT = 8  # raised also when the rules of folders, lists or shards change
_SETTLED_NS = 2_000_000_000  # a file that changed so recently may change again unseen
KEEP_FROM = 10_000  # images; with fewer the cache is not worth it
_WATCHED, _STAMPS = "watched", "stamps"
Stamp = tuple[int, int]  # size and time of last change


class StringTable(Sequence[str]):
    """Strings end to end in one uint8 array; `table[i]` is decoded on access."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self.data, self.offsets = data, offsets

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> StringTable:
        """Pack strings; file names that are not UTF-8 survive the round trip."""
        encoded = [os.fsencode(string) for string in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(e) for e in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        """Number of strings."""
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        """String number i >= 0, or a list of some."""
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(self.data[self.offsets[i] : self.offsets[i + 1]].tobytes())

    def where(self, stays: np.ndarray) -> StringTable:
        """The strings that `stays`, bool [n], is true for."""
        sizes = np.diff(self.offsets)
        offsets = np.zeros(int(stays.sum()) + 1, np.int64)
        np.cumsum(sizes[stays], out=offsets[1:])
        return StringTable(self.data[np.repeat(stays, sizes)], offsets)


def cache_folder() -> Path:
    """The folder of indexes: $MSN_CACHE_DIR, else `msn` in the user's cache folder.

    Without a home, as in some containers, it is in the folder of temporary files.
    """
    given = os.environ.get("MSN_CACHE_DIR")
    if given:
        return Path(given)
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "msn"
    try:
        return Path.home() / ".cache" / "msn"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"msn-cache-{os.getuid()}"


def stamp(path: str) -> Stamp:
    """Size in bytes, 0 for a folder, and time of the last change in ns.

    Adding, removing or renaming a file changes its folder's time.

    Raises:
        OSError: nothing is there.
    """
    status = os.stat(path)
    return 0 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns


class Table(NamedTuple):
    """Columns of numbers and of strings, and further JSON values."""

    arrays: dict[str, np.ndarray]
    strings: dict[str, StringTable]
    facts: dict[str, Any]


def keep_table(key: str, table: Table, watched: Mapping[str, Stamp], since: int) -> None:
    """Cache a table, unless its files changed too recently or the cache cannot be written.

    Args:
        key: describes the table.
        table: what to keep.
        watched: the files and folders it was read from, with their stamps before reading.
        since: when reading began, in ns.
    """
    if any(changed >= since - _SETTLED_NS for _, changed in watched.values()):
        return
    arrays = {**table.arrays, _STAMPS: np.array(list(watched.values()), np.int64).ravel()}
    strings = {**table.strings, _WATCHED: StringTable.from_strings(watched)}
    for name, column in strings.items():
        arrays |= {f"{name}:data": column.data, f"{name}:offsets": column.offsets}
    try:
        _store(_cache_file(key), {"key": key, "strings": list(strings), **table.facts}, arrays)
    except OSError as error:
        log.info("the index of the images is not kept: %s", error)


def kept_table(key: str, read_from: Sequence[str] | None = None) -> Table | None:
    """The memory-mapped table of a key, or None if a file that it was read from has changed.

    Args:
        key: of `keep_table`.
        read_from: the files that it must have been read from; None takes any.
    """
    try:
        with _cache_file(key).open("rb") as file:  # all of one: another process may replace it
            header, arrays = _map(file)
        if header.get("key") != key:
            return None
        strings = {
            name: StringTable(arrays.pop(f"{name}:data"), arrays.pop(f"{name}:offsets"))
            for name in header["strings"]
        }
        watched, stamps = strings.pop(_WATCHED), arrays.pop(_STAMPS).reshape(-1, 2).tolist()
        if read_from is not None and list(watched) != read_from:
            return None
        if any(stamp(path) != tuple(seen) for path, seen in zip(watched, stamps, strict=True)):
            return None
    except (OSError, ValueError):  # missing or damaged
        return None
    return Table(arrays, strings, header)


def _cache_file(key: str) -> Path:
    digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
    return cache_folder() / f"index-{digest}.bin"


def _format() -> list[int | str]:
    return [_FORMAT, *SUFFIXES]  # which kinds are read depends on what is installed


def _store(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a JSON header and arrays so that they can be mapped; all or nothing."""
    at, layout = 0, {}
    for name, array in arrays.items():
        layout[name] = [array.dtype.str, at, len(array)]
        at += -(-array.nbytes // 64) * 64
    text = json.dumps({"format": _format(), "arrays": layout, **header}).encode()
    text += b" " * (-(len(text) + 8) % 64)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.tobytes() + bytes(-array.nbytes % 64))

    write_atomically(path, write)


def _map(file: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of `_store`; both are empty if the format differs or the file is cut."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length)) if length < size else {}
    if header.get("format") != _format():
        return {}, {}
    arrays: dict[str, np.ndarray] = {}
    for name, (dtype, at, count) in header["arrays"].items():
        if 8 + length + at + count * np.dtype(dtype).itemsize > size:
            return {}, {}
        if count == 0:
            arrays[name] = np.empty(0, dtype)
        else:
            arrays[name] = np.memmap(file, dtype, "r", 8 + length + at, (count,))
    return header, arrays
