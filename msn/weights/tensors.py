"""Read and write files of tensors: nothing that is read runs code, what is written is whole.

What a file of `torch.save` claims to hold is counted before any of it is built.
"""

import argparse
import errno
import hashlib
import io
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from msn.errors import UserError, brief
from msn.files import SEAL, damage, utf8_path, write_bytes
from msn.weights.weights import trunk_digest

# In the metadata of safetensors files that we write.
CHECKSUM = "msn.sha256"


def open_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a weight file of any kind to the CPU.

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
        # In a file whose end was cut off, torch seeks to before the start.
        what = "damaged or cut off" if error.errno == errno.EINVAL else "cannot be read"
        raise UserError(f"{path}: {what} ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_refused(path, error)}") from error
    except Exception as error:  # a damaged pickle can raise any error
        kind = "safetensors file" if path.suffix == ".safetensors" else "file that torch.save wrote"
        raise UserError(
            f"{path}: damaged, cut off, or not a {kind}: {type(error).__name__}: {brief(error, 80)}"
        ) from error


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with utf8_path(path) as place, safe_open(place, framework="pt") as file:
        names = list(file.keys())  # the file is not a mapping
        _refuse_beyond(len(names), MAX_TENSORS, "tensors", path)
        tensors = {name: file.get_tensor(name) for name in names}
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
    """SHA-256 of tensors and of the metadata beside them, without the checksum itself."""
    said = {key: value for key, value in metadata.items() if key != CHECKSUM}
    text = json.dumps(said, sort_keys=True) + trunk_digest(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def _refused(path: Path, error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is not None:
        return f"refused: the pickle would run {found[1]}; only tensors and plain data are opened"
    if zipfile.is_zipfile(path):
        return "refused: the pickle carries more than tensors and plain data"
    return "refused: damaged, or a pickle that carries code; only plain data is opened"


MAX_TENSORS = 20_000  # a training checkpoint of 40 blocks has about 4,000
_MAX_OPCODES = 3_000_000  # a second of reading
# The first of the four pickles of files older than torch 1.6.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_AXES = 8
_ITEM_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
# numpy's names of types and the letters of `struct`.
_NUMBERS = {
    **{"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "f2": "e"},
    **{"i4": "i", "u4": "I", "f4": "f", "i8": "q", "u8": "Q", "f8": "d"},
}


class _NumpyType:
    """Stands for numpy.dtype: keeps only the name."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _numpy_scalar(kind: _NumpyType, data: bytes) -> Any:
    """Stands for numpy's constructor of scalars: returns a Python number."""
    return struct.unpack(kind.order + _NUMBERS[kind.name], data)[0]


# What other training scripts store beside their weights; numpy's own code never runs.
SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def check_torch_file(path: Path) -> None:
    """Refuse a file of `torch.save` that is damaged or claims more than it holds.

    Checks the checksum of our files, the CRC-32 of everyone's, and that no tensor or record is
    larger than the bytes behind it.

    Raises:
        UserError: in one line.
        Exception: any error, of a damaged pickle or archive.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            file.seek(0)
            if _counted(file, path, size) == _LEGACY_MAGIC:
                for _ in range(3):  # protocol, system, content
                    _counted(file, path, size)
            return
    with zipfile.ZipFile(path) as archive:
        _check_archive(archive, path, size)
        for member in archive.infolist():
            if member.filename.endswith("/data.pkl"):
                _counted(io.BytesIO(archive.open(member).read()), path, size)


def _refuse_beyond(count: int, most: int, what: str, path: Path) -> None:
    """Refuse a file that would take minutes to read and cannot be a network."""
    if count > most:
        raise UserError(
            f"{path}: refused: holds more than {most:,} {what}; no backbone has that many"
        )


def _check_archive(archive: zipfile.ZipFile, path: Path, size: int) -> None:
    members = archive.infolist()
    _refuse_beyond(len(members), MAX_TENSORS, "tensors", path)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(
            f"{path}: refused: its members are compressed; torch.save writes them plain"
        )
    if sum(member.file_size for member in members) > size:
        raise UserError(f"{path}: damaged: its members claim more bytes than the file has")
    if archive.comment.startswith(SEAL):
        if (reason := damage(path)) is not None:
            raise UserError(f"{path}: damaged ({reason})")
        return
    for member in members:
        if member.CRC == 0:  # torch can be told to write none; then none is checked
            del member.CRC
            continue
        with archive.open(member) as file:
            while file.read(1 << 20):
                pass


class _Tensor:
    """Stands for a tensor."""

    __slots__ = ()


class _Dict(OrderedDict[Any, Any]):
    """A state dict, whose one attribute is `_metadata`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        if set(state) - {"_metadata"}:
            raise pickle.UnpicklingError("attributes of a dictionary")


def _counted(file: IO[bytes], path: Path, size: int) -> Any:
    """Read one pickle into stand-ins and leave the file position after it."""
    start = file.tell()
    made = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        made += opcode.name == "REDUCE"  # a tensor takes two: itself and its hooks
        _refuse_beyond(made // 2, MAX_TENSORS, "tensors", path)
        _refuse_beyond(number, _MAX_OPCODES, "names and numbers beside its tensors", path)
        # Python allocates as many entries as the largest memo index.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > size:
            raise pickle.UnpicklingError("memo")
    file.seek(start)
    return _Counter(file, path, size).load()


class _Counter(pickle.Unpickler):
    """Unpickles into stand-ins: nothing of the file runs, no storage is read."""

    def __init__(self, file: IO[bytes], path: Path, size: int) -> None:
        super().__init__(file, encoding="utf-8")
        self._path, self._size = path, size
        self._stored: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        is_type = name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
        if module in ("torch", "torch.storage") and is_type:
            return full  # a type of storage or of numbers
        made = {
            "collections.OrderedDict": _Dict,
            "argparse.Namespace": argparse.Namespace,
            "builtins.set": set,
            "builtins.complex": complex,
            "_codecs.encode": _latin1,
            "numpy.dtype": _NumpyType,
            "numpy.core.multiarray.scalar": _numpy_scalar,
            "numpy._core.multiarray.scalar": _numpy_scalar,
            "torch.Size": tuple,
            "torch.device": str,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        }
        if full in made:
            return made[full]
        if full.startswith("torch._utils._rebuild_"):
            kind = name.removeprefix("_rebuild_").replace("_", " ")
            raise UserError(f"{self._path}: refused: holds a {kind}; only dense tensors are read")
        raise pickle.UnpicklingError(f"GLOBAL {full}")

    def persistent_load(self, pid: Any) -> int:
        """Number of elements that a storage claims to hold."""
        _, kind, key, _, count, *_ = pid
        bytes_each = _ITEM_BYTES.get(str(kind).rpartition(".")[2].removesuffix("Storage"), 1)
        self._stored[str(key)] = int(count) * bytes_each
        if int(count) < 0 or sum(self._stored.values()) > self._size:
            raise UserError(
                f"{self._path}: damaged: its tensors claim more bytes than the file has"
            )
        return int(count)

    def _tensor(self, count: int, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
        if len(size) > _MAX_AXES or prod(size) > count:
            raise UserError(
                f"{self._path}: refused: a tensor of shape {str(list(size[:_MAX_AXES]))[:80]} "
                f"repeats the {count} numbers that are stored"
            )
        return _Tensor()


def _latin1(text: str, codec: str) -> bytes:
    """Decode bytes of pickle protocol 2; other codecs could expand them without limit."""
    if codec != "latin1":
        raise pickle.UnpicklingError("GLOBAL _codecs.encode")
    return text.encode("latin1")
