"""Weight files: nothing that is read runs code, what is written is whole."""

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msn.errors import UserError
from msn.files import write_bytes


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


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole; `format: pt` is added for other libraries."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(content, {"format": "pt", **metadata})
    write_bytes(path, data)


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
