"""Crash-safe writes, checksums in checkpoints, and reading of damaged CSV tables."""

import contextlib
import csv
import errno
import hashlib
import io
import logging
import os
import secrets
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from msn.errors import UserError

log = logging.getLogger(__name__)

TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
SLACK = 1 << 20  # bytes that must stay free beside a checkpoint: names, tables, other small files
SEAL = b"sha256:"  # begins the comment of an archive with a checksum
# A zip archive ends in a record of 22 bytes, the last two the length of a comment, and that.
_END, _END_SIZE, _LENGTH = b"PK\5\6", 22, struct.Struct("<H")


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file so that after a crash either the old or the new one is there, complete.

    The file gets the permissions that the umask leaves.

    Args:
        path: the file; directories above it are made.
        write: writes the content to the binary file that it is given.

    Raises:
        OSError: the system's error, about `path`; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with temporary.open("x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it would hide the first error
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # else it names the temporary file or, on a full disk, none
        raise


def write_file(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file by `write_atomically`, and report a failure as the user's.

    Raises:
        UserError: if the disk is full or the place cannot be written to; nothing is left behind.
    """
    with writing_to(path):
        write_atomically(path, write)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes by `write_file`."""
    write_file(path, lambda file: file.write(data))


def utf8(name: str) -> str:
    """A file name for formats that hold UTF-8 alone: other bytes are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals inside the block into a `UserError` about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def placed_at(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that replaces `out` if the block succeeds.

    Raises:
        UserError: if the place cannot be written to; `out` is left as it was.
    """
    with writing_to(out):
        made = [parent for parent in out.parents if not parent.exists()]
        temporary = temporary_beside(out)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            sync_directory(temporary)
            _swap(temporary, out)
            sync_directory(out.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """The path, or a link to it if its name is not UTF-8, which Rust and C++ refuse."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as place:
            link = Path(place, "link")
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def temporary_beside(path: Path) -> Path:
    """A new name in the same directory that `remove_stale` recognises."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write plain data with a checksum inside; `torch.load` still reads the file.

    Args:
        path: the file; directories above it are made.
        checkpoint: tensors, numbers, strings, and lists, tuples and dicts of them.

    Raises:
        OSError: the system's error, or too little space is free; an older file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = tensor_bytes(checkpoint) + SLACK
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        reason = f"{os.strerror(errno.ENOSPC)} ({free >> 20} MB free, {needed >> 20} MB needed)"
        raise OSError(errno.ENOSPC, reason, str(path))

    def write(file: IO[bytes]) -> None:
        hashing = _Hashing(file)
        try:
            torch.save(checkpoint, cast("IO[bytes]", hashing))  # torch only writes and flushes
        except RuntimeError as error:
            # torch raises an error of its own instead of the system's.
            raise hashing.error or error from None
        _seal(file, hashing.digest.hexdigest())

    write_atomically(path, write)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if nothing is.

    A file without our checksum is trusted if it is a complete archive.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "not a regular file"  # opening a pipe would wait for a writer
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            comment = _comment(file, size)
            if comment is None:
                return "not a whole checkpoint file"
            if not comment.startswith(SEAL):
                return _damage_without_seal(path)
            file.seek(0)
            digest = _digest(file, size - len(comment) - _LENGTH.size)
    except OSError as error:
        return error.strerror or type(error).__name__
    return None if digest.encode() == comment[len(SEAL) :] else "its checksum does not match"


def tensor_bytes(data: Any) -> int:
    """Bytes of all tensors in nested plain data."""
    if isinstance(data, Tensor):
        return data.numel() * data.element_size()
    if isinstance(data, dict):
        return sum(tensor_bytes(value) for value in data.values())
    if isinstance(data, (list, tuple)):
        return sum(tensor_bytes(value) for value in data)
    return 0


def read_rows(path: Path, *, text: Collection[str] = ()) -> list[dict[str, str]]:
    """Rows of a CSV file with a header and a column `step`; none if there is no file.

    Damaged rows are left out, and the log says how many.

    Args:
        path: metrics.csv or verdicts.csv of a run.
        text: columns of any text; all others hold a number or nothing.

    Raises:
        UserError: if it is not a CSV file.
    """
    if not path.is_file():
        return []
    text_of_file = path.read_bytes().decode(errors="replace")
    if "\0" in text_of_file:
        log.warning("%s: zero bytes, as after a crash of the machine, are left out", path)
        text_of_file = text_of_file.replace("\0", "")
    try:
        rows = list(csv.DictReader(io.StringIO(text_of_file, newline="")))
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None
    whole = [row for row in rows if _is_whole(row, text)]
    if len(whole) < len(rows):
        log.warning("%s: %d damaged rows are left out", path, len(rows) - len(whole))
    return whole


def _is_whole(row: dict[Any, Any], text: Collection[str]) -> bool:
    if None in row or None in row.values() or not row.get("step", "").isdigit():
        return False  # fields are missing, or there are too many
    try:
        for name, value in row.items():
            if name not in text and value:
                float(value)
    except ValueError:
        return False
    return True


def remove_stale(directory: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for path in directory.glob(".*.tmp") if directory.is_dir() else []:
        path.unlink(missing_ok=True)


def _swap(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = temporary_beside(out)
    old.mkdir()
    try:
        out.replace(old / "old")
        try:
            new.replace(out)
        except OSError:
            (old / "old").replace(out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


class _Hashing:
    """A file that is only written to, with the digest of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _seal(file: IO[bytes], digest: str) -> None:
    """Put the digest into the archive's comment, which readers of archives ignore."""
    comment = SEAL + digest.encode()
    file.seek(-_LENGTH.size, os.SEEK_END)
    assert file.read() == _LENGTH.pack(0), "torch.save wrote an archive with a comment"
    file.seek(-_LENGTH.size, os.SEEK_END)
    file.write(_LENGTH.pack(len(comment)) + comment)


def _digest(file: IO[bytes], size: int) -> str:
    """Digest of the file as torch wrote it: `size` bytes and an empty comment."""
    digest = hashlib.sha256()
    while size > 0:
        block = file.read(min(size, 1 << 22))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    digest.update(_LENGTH.pack(0))
    return digest.hexdigest()


def _comment(file: IO[bytes], size: int) -> bytes | None:
    """The comment at the end of an archive; None if the file does not end as an archive."""
    file.seek(max(0, size - 1024))
    tail = file.read()
    start = tail.rfind(_END)
    if start < 0 or start + _END_SIZE > len(tail):
        return None
    comment = tail[start + _END_SIZE :]
    (length,) = _LENGTH.unpack_from(tail, start + _END_SIZE - _LENGTH.size)
    return comment if length == len(comment) else None


def _damage_without_seal(path: Path) -> str | None:
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch has no class of errors for damaged files
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
