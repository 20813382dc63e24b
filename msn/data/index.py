"""An index of image files: built in parallel, kept in a cache, mapped into memory by every process.

Paths lie end to end in one block of bytes with an array of offsets, so a million of them load in
milliseconds and all workers and processes share the same pages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from msn.data.decode import SUFFIXES

log = logging.getLogger(__name__)

_FORMAT = (
    2  # also raised when SUFFIXES or the rules of shards change: an index holds what they find
)
_THREADS = 16
_CACHE_FROM = 10_000  # images; smaller folders are read again faster than a cache is worth
SETTLED_NS = 2_000_000_000  # a directory changed this shortly before a scan may change unseen


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

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        """String number i; a slice is not supported."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(self.data[self.offsets[i] : self.offsets[i + 1]].tobytes())


def scan_folder(root: str, cache_from: int = _CACHE_FROM) -> StringTable:
    """Find every image file below a folder, in the order of their relative paths.

    Hidden files and folders are passed over, links to folders are followed. The result for a large
    folder is kept in the user's cache and used again while no folder in it has changed.

    Args:
        root: an existing folder.
        cache_from: number of images from which on the result is kept.

    Returns:
        Paths relative to `root` with `/` between their parts, sorted. Folders below the root that
        cannot be listed are passed over with a warning.

    Raises:
        OSError: the root cannot be listed.
    """
    root = os.path.realpath(root)
    cached = _load_cached(root)
    if cached is not None:
        return cached
    started = time.time_ns()
    paths, folders, closed = _walk(root)
    if closed:
        more = f" and {len(closed) - 1} more" if len(closed) > 1 else ""
        log.warning("%s: passed over what cannot be listed: %s%s", root, closed[0], more)
    table = StringTable.from_strings(sorted(paths))
    if len(table) >= cache_from:
        settled = all(stamp < started - SETTLED_NS for stamp in folders.values())
        if settled and not closed:  # else they would stay away when they can be listed again
            _store_cached(root, table, folders)
        log.info("found %d images below %s in %.1f s", len(table), root, _since(started))
    return table


def _since(started: int) -> float:
    return (time.time_ns() - started) / 1e9


def _walk(root: str) -> tuple[list[str], dict[str, int], list[str]]:
    """Read the tree with many threads.

    Returns:
        Relative image paths, folders with change times in ns, and what cannot be listed and why.
    """
    paths: list[str] = []
    folders: dict[str, int] = {}
    closed: list[str] = []
    with progress_bar("looking for images") as advance, ThreadPoolExecutor(_THREADS) as pool:
        pending = {pool.submit(_list_folder, root, "", frozenset())}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                found = future.result()
                folders[found.folder] = found.stamp
                paths += found.files
                closed += found.closed
                pending |= {pool.submit(_list_folder, root, f, found.above) for f in found.inner}
            advance(f"looking for images: {len(paths)} in {len(folders)} folders")
    return paths, folders, sorted(closed)


class _Listing(NamedTuple):
    """One folder: its change time in ns, images, folders in it, those above, what is closed."""

    folder: str
    stamp: int
    files: list[str]
    inner: list[str]
    above: frozenset[tuple[int, int]]
    closed: list[str]


def _list_folder(root: str, folder: str, above: frozenset[tuple[int, int]]) -> _Listing:
    """List one folder; one below the root that cannot be listed is closed and empty."""
    try:
        return _read_folder(root, folder, above)
    except OSError as error:
        if not folder:
            raise
        return _Listing(folder, 0, [], [], above, [_closed(folder, error)])


def _closed(folder: str, error: OSError) -> str:
    return f"{folder} ({error.strerror or type(error).__name__})"


def _read_folder(root: str, folder: str, above: frozenset[tuple[int, int]]) -> _Listing:
    absolute = os.path.join(root, folder)
    status = os.stat(absolute)
    identity = (status.st_dev, status.st_ino)
    found = _Listing(folder, status.st_mtime_ns, [], [], above | {identity}, [])
    if identity in above:  # a link back up the tree would otherwise never end
        return found
    prefix = f"{folder}/" if folder else ""
    with os.scandir(absolute) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(".") or name == "__MACOSX":
                continue
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself, or to behind a folder that is closed
                is_folder = False
                if not name.lower().endswith(SUFFIXES):
                    found.closed.append(_closed(prefix + name, error))
            if is_folder:
                found.inner.append(prefix + name)
            elif name.lower().endswith(SUFFIXES):
                found.files.append(prefix + name)
    return found


@contextlib.contextmanager
def progress_bar(text: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Show that something goes on, on a terminal alone; the yielded function takes one step.

    Args:
        text: what is going on.
        total: steps until the end; None where nobody knows.
    """
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [BarColumn()] if total is not None else []
    progress = Progress(
        *columns,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with progress:
        task = progress.add_task(text, total=total)
        yield lambda text: progress.update(task, description=text, advance=1)


def cache_folder() -> Path:
    """Where indexes are kept: $MSN_CACHE_DIR, else `msn` in the user's cache folder."""
    given = os.environ.get("MSN_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msn"


def cache_file(key: str) -> Path:
    """The cache file for whatever the key describes."""
    digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
    return cache_folder() / f"index-{digest}.bin"


def store_arrays(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a JSON header and arrays so that they can be mapped; all or nothing.

    A cache that cannot be written is a cache not used: the error is logged, not raised.
    """
    at, layout = 0, {}
    for name, array in arrays.items():
        layout[name] = [array.dtype.str, at, len(array)]
        at += -(-array.nbytes // 64) * 64
    text = json.dumps({"format": _FORMAT, "arrays": layout, **header}).encode()
    text += b" " * (-(len(text) + 8) % 64)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(array.tobytes() + bytes(-array.nbytes % 64))
        os.replace(file.name, path)
    except OSError as error:
        log.info("the index of the images is not kept: %s", error)


def load_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Map a file of `store_arrays`; None if there is none of this format or it is damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < size else {}
    except (OSError, ValueError):
        return None
    if header.get("format") != _FORMAT:
        return None
    arrays = {}
    for name, (dtype, at, count) in header["arrays"].items():
        if 8 + length + at + count * np.dtype(dtype).itemsize > size:
            return None
        if count == 0:
            arrays[name] = np.empty(0, dtype)
        else:
            arrays[name] = np.memmap(path, dtype, "r", 8 + length + at, (count,))
    return header, arrays


def _store_cached(root: str, table: StringTable, folders: dict[str, int]) -> None:
    names = StringTable.from_strings(folders)
    arrays = {
        "data": table.data,
        "offsets": table.offsets,
        "folder_data": names.data,
        "folder_offsets": names.offsets,
        "folder_stamps": np.fromiter(folders.values(), np.int64),
    }
    store_arrays(cache_file(root), {"root": root}, arrays)


def _load_cached(root: str) -> StringTable | None:
    """The stored table, unless a folder was added, removed or changed since.

    Adding, removing or renaming a file changes its folder's time, so only folders are looked at.
    """
    loaded = load_arrays(cache_file(root))
    if loaded is None or loaded[0]["root"] != root:
        return None
    arrays = loaded[1]
    folders = StringTable(arrays["folder_data"], arrays["folder_offsets"])
    try:
        for folder, stamp in zip(folders, arrays["folder_stamps"], strict=True):
            if os.stat(os.path.join(root, folder)).st_mtime_ns != stamp:
                return None
    except OSError:
        return None
    return StringTable(arrays["data"], arrays["offsets"])
