"""Weight files: nothing that is read runs code, what is written is whole."""

import errno
import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from msn.errors import UserError
from msn.files import write_bytes
from msn.weights.pickles import SAFE_GLOBALS, check_torch_file
from msn.weights.weights import trunk_digest

# In the metadata of safetensors files that we write.
CHECKSUM = "msn.sha256"


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
        what = "not a regular file" if path.exists() and not path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}")
    try:
        if path.suffix == ".safetensors":
            return _open_safetensors(path)
        check_torch_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE_GLOBALS):
            # Of unusual pickle protocols: refused or read, see below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except UserError:
        raise
    except OSError as error:
        # torch seeks before the start of a file whose end was cut off.
        what = "damaged or cut off" if error.errno == errno.EINVAL else "cannot be read"
        raise UserError(f"{path}: {what} ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_refused(path, error)}") from error
    # The bytes are not ours: a damaged pickle raises whatever its opcodes run into.
    except Exception as error:
        kind = "safetensors file" if path.suffix == ".safetensors" else "file that torch.save wrote"
        raise UserError(
            f"{path}: damaged, cut off, or not a {kind} "
            f"({type(error).__name__}: {_line(error)[:80]})"
        ) from error


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors, metadata):
        raise UserError(f"{path}: damaged, or changed by another tool: its checksum does not match")
    return tensors, metadata


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole, with a checksum of all that it holds.

    `format: pt` is added for other libraries.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **metadata}
    metadata[CHECKSUM] = checksum(content, metadata)
    write_bytes(path, safetensors.torch.save(content, metadata))


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of tensors and of the metadata beside them, the checksum itself apart."""
    said = {key: value for key, value in metadata.items() if key != CHECKSUM}
    text = json.dumps(said, sort_keys=True) + trunk_digest(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


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
