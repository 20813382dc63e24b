"""Weight files: nothing that is read runs code, nothing that is written is left half-written."""

import contextlib
import errno
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msn.errors import UserError


def open_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a weight file to the CPU, whatever its kind.

    Args:
        path: a `.safetensors` file, or any other name for what `torch.save` wrote.

    Returns:
        The content (of safetensors: names and tensors) and the safetensors metadata.

    Raises:
        UserError: if the file is missing, damaged, or a pickle that holds more than plain data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        with warnings.catch_warnings():
            # Of unusual pickle protocols: refused or read, see below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except OSError as error:
        # torch seeks before the start of a file whose end was cut off.
        what = "damaged or cut off" if error.errno == errno.EINVAL else "cannot be read"
        raise UserError(f"{path}: {what} ({error.strerror or error})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_refused(path, error)}") from error
    # The bytes are not ours: a damaged pickle raises whatever its opcodes run into.
    except Exception as error:
        raise UserError(
            f"{path}: damaged, cut off, or not a file that torch.save wrote "
            f"({type(error).__name__}: {_line(error)[:80]})"
        ) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Args:
        path: the file; its directory is made where it is missing.
        write: fills the open temporary file, which stands beside `path`.

    Raises:
        UserError: if the disk is full or the place cannot be written to; nothing is left then.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~user_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file by `write_atomically`; `format: pt` is added for other libraries."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(content, {"format": "pt", **metadata})
    write_bytes(path, data)


def write_bytes(path: Path, data: bytes) -> None:
    """Write some bytes by `write_atomically`."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    write_atomically(path, write)


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        UserError: if the place cannot be written to; nothing is left then, and what stood at `out`
            still stands.
    """
    with writing_to(out):
        made = [parent for parent in out.parents if not parent.exists()]
        temporary = None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            temporary.chmod(0o777 & ~user_umask())
            yield temporary
            sync_directory(temporary)
            _swap(temporary, out)
            sync_directory(out.parent)
        except BaseException:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def user_umask() -> int:
    """What `tempfile` ignores: the permission bits that files of this user do not have."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    os.replace(out, old / "old")
    try:
        os.replace(new, out)
    except OSError:
        os.replace(old / "old", out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _refused(path: Path, error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is not None:
        return (
            f"refused: the pickle wants to run {found[1]}; only tensors and plain data are opened"
        )
    if zipfile.is_zipfile(path):
        return "refused: the pickle carries more than tensors and plain data"
    return "refused: damaged, or a pickle that carries code; only plain data is opened"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
