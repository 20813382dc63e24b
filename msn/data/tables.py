"""Tables that are kept between runs: arrays in a file that every process maps into memory.

Strings lie end to end in one block of bytes with an array of offsets, so a million of them load in
milliseconds and all workers and processes share the same pages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from msn.data.kinds import SUFFIXES
from msn.files import write_atomically

log = logging.getLogger(__name__)

# Also raised when the rules of folders, lists and shards change: a table holds what they find.
_FORMAT = 6
SETTLED_NS = 2_000_000_000  # a directory or list changed this shortly before may change unseen


class StringTable(Sequence[str]):
    """Strings end to end in one uint8 array; `table[i]` is decoded when asked for."""

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

    # Sequence promises slices as well, which nobody takes of a million strings.
    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        """String number i; a slice is not supported."""
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
    """Where indexes are kept: $MSN_CACHE_DIR, else `msn` in the user's cache folder.

    A user of a container may have neither HOME nor a name: then it lies with temporary files.
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


def cache_file(key: str) -> Path:
    """The cache file for whatever the key describes."""
    digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
    return cache_folder() / f"index-{digest}.bin"


def _format() -> list[int | str]:
    return [_FORMAT, *SUFFIXES]  # which kinds are read depends on what is installed


def store_arrays(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a JSON header and arrays so that they can be mapped; all or nothing.

    A cache that cannot be written is a cache not used: the error is logged, not raised.
    """
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

    try:
        write_atomically(path, write)
    except OSError as error:
        log.info("the index of the images is not kept: %s", error)


def load_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Map a file of `store_arrays`; None if there is none of this format or it is damaged."""
    try:
        with path.open("rb") as file:  # all of one file: another process may replace it meanwhile
            return _map_arrays(file)
    except (OSError, ValueError):
        return None


def _map_arrays(file: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length)) if length < size else {}
    if header.get("format") != _format():
        return None
    arrays: dict[str, np.ndarray] = {}
    for name, (dtype, at, count) in header["arrays"].items():
        if 8 + length + at + count * np.dtype(dtype).itemsize > size:
            return None
        if count == 0:
            arrays[name] = np.empty(0, dtype)
        else:
            arrays[name] = np.memmap(file, dtype, "r", 8 + length + at, (count,))
    return header, arrays
