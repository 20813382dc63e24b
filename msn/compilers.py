"""What `torch.compile` and Triton call and a machine may lack: many images come without."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def missing_compiler(device_type: str) -> str | None:
    """What compiled code for a device needs and this machine lacks, in a few words; None: nothing.

    Args:
        device_type: of `torch.device`; for CUDA Triton builds its launchers with a C compiler and
            Python's headers, elsewhere torch compiles C++.
    """
    cuda = device_type == "cuda"
    if cuda and importlib.util.find_spec("triton") is None:
        return "Triton"
    kind, variable, names = _C if cuda else _CXX
    if not any(shutil.which(name) for name in (os.environ.get(variable), *names) if name):
        return f"{kind} compiler ({', '.join(names)}, or what {variable} names)"
    if cuda and not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python.h (Python's development package)"
    return None


_C = ("C", "CC", ("gcc", "clang"))
_CXX = ("C++", "CXX", ("g++", "clang++"))
