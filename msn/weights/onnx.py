"""Write and read ONNX with a dynamic batch axis (extra `onnx`)."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msn.errors import UserError, brief
from msn.files import write_bytes
from msn.weights.tensors import CHECKSUM, checksum
from msn.weights.timm import timm_twin
from msn.weights.weights import Weights, strip_prefix

INPUT, OUTPUT = "pixel_values", "tokens"
INSTALL = "pip install 'msn-pretraining[onnx]'"
_PREFIX = "trunk."


class _Tokens(nn.Module):
    """All tokens after the final norm, from timm's blocks, whose graph is simpler than ours."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.trunk = timm_twin(weights.trunk, weights.model)
        for block in self.trunk.blocks:
            block.get_submodule("attn").fused_attn = False  # type: ignore[assignment]

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.trunk.forward_features(pixel_values)


def write_onnx(path: Path, weights: Weights, header: Mapping[str, Any]) -> None:
    """Write `[batch, 3, S, S] pixel_values -> [batch, 1 + N, D] tokens` with our header in it.

    The graph is not optimised, so every weight keeps its name and `read_onnx` gets it back bit by
    bit; onnxruntime optimises on loading.
    """
    size = weights.model["img_size"]
    program = torch.onnx.export(
        _Tokens(weights).eval(),
        (torch.zeros(2, 3, int(size), int(size)),),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for graph in (proto.graph, *proto.functions):
        for node in graph.node:
            del node.metadata_props[:]  # torch's stack traces, with paths of this machine
    metadata = {"msn": json.dumps(header)}
    metadata[CHECKSUM] = checksum(_tensors(proto), metadata)
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    write_bytes(path, proto.SerializeToString())


def read_onnx(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict in timm's names and metadata of a file that `write_onnx` wrote.

    Raises:
        UserError: if the file is missing or damaged, or the extra `onnx` is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if importlib.util.find_spec("onnx") is None:
        raise UserError(f"{path}: reading ONNX needs onnx, which is not installed: {INSTALL}")
    import onnx

    try:
        proto = onnx.load(path, load_external_data=False)
        tensors = _tensors(proto)
    except Exception as error:  # protobuf's own is a plain Exception
        raise UserError(f"{path}: damaged or not an ONNX file ({brief(error, 80)})") from error
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors, metadata):
        raise UserError(f"{path}: damaged, or changed by another tool: its checksum does not match")
    trunk = strip_prefix(tensors, _PREFIX)
    for name in [name for name in trunk if name.startswith("rope.") or name.endswith(".k_bias")]:
        del trunk[name]  # timm's buffers, which it computes
    return trunk, metadata


def _tensors(proto: Any) -> dict[str, Tensor]:
    import onnx

    return {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy())
        for item in proto.graph.initializer
    }
