"""Take a step from its dump again, in one process, and look where a number stops being finite."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from msn.errors import UserError
from msn.method import optim
from msn.training.guard import DUMP_FORMAT
from msn.training.module import MSNModule

_TYPES = {"64-true": torch.float64}
_AUTOCAST = {"bf16-mixed": torch.bfloat16}


class Reproduction(NamedTuple):
    """What a step from a dump gives here."""

    step: int
    epoch: int
    batch: int
    recorded: list[tuple[float, float]]
    """Loss and gradient norm of each process then."""
    loss: float
    """Mean over the joined batch."""
    grad_norm: float
    """Of the anchor encoder; not finite where that of the prototypes is not."""
    weights: list[str]
    """Parameters that were not finite before the step."""
    first: str | None
    """The first module whose output is not finite, in the order of the forward pass."""
    images: list[int]
    """Images of the training set that have a projection that is not finite."""

    @property
    def finite(self) -> bool:
        """Whether the step could have been taken."""
        return all(torch.tensor([self.loss, self.grad_norm]).isfinite())


def reproduce(path: Path, *, device: torch.device, chunk_size: int | None) -> Reproduction:
    """Take the step of a dump again, with the batches of all processes joined.

    Args:
        path: the file of any process; those of the others lie beside it.
        device: where to compute; the same kind as then reproduces exactly.
        chunk_size: images a trunk pass, for a joined batch that is too large; None takes all.

    Raises:
        UserError: if a file is missing, damaged or no dump.
    """
    parts = _read(path)
    first = parts[0]
    module = MSNModule(**first["settings"], chunk_size=chunk_size, compile=False)
    network = module.network
    network.load_state_dict(first["network"])
    network.to(device, _TYPES.get(first["precision"], torch.float32)).train()
    weights = [n for n, value in network.named_parameters() if not value.isfinite().all()]
    views = {
        name: torch.cat([part["views"][name] for part in parts], dim=0 if name == "target" else 1)
        for name in ("target", "rand", "focal")
    }
    kept = first["kept"]
    if kept is not None and kept.ndim > 1:  # a choice of its own for each image
        kept = torch.cat([part["kept"] for part in parts], dim=1)
    with _watch(network) as bad, _autocast(first["precision"], device):
        out = network(
            *(views[name].to(device) for name in ("target", "rand", "focal")),
            None if kept is None else kept.to(device),
            chunk_size,
        )
        terms = module.loss(
            out.anchor, out.target, network.prototypes, first["sharpen_temperature"]
        )
    terms.loss.backward()
    assert network.prototypes.grad is not None
    norm = optim.clip_encoder(network.anchor, None) + 0 * network.prototypes.grad.norm()
    spoilt = ~(out.anchor.isfinite().all(-1).all(0) & out.target.isfinite().all(-1))  # [B]
    images = torch.tensor([image for part in parts for image in part["images"]])
    return Reproduction(
        step=first["step"],
        epoch=first["epoch"],
        batch=first["batch"],
        recorded=[(part["loss"], part["grad_norm"]) for part in parts],
        loss=terms.loss.item(),
        grad_norm=norm.item(),
        weights=weights,
        first=bad[0] if bad else None,
        images=images[spoilt.cpu()].tolist(),
    )


def _read(path: Path) -> list[dict[str, Any]]:
    named = _load(path)
    files = [path.with_name(f"rank-{rank}.pt") for rank in range(named["world_size"])]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{path.parent} lacks {missing[0]}: a step needs the dumps of all processes"
        )
    return [_load(file) for file in files]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no such dump: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch names no class for damaged files
        content = None
    if not isinstance(content, dict) or content.get("format") != DUMP_FORMAT:
        raise UserError(f"{path} is no dump of a step (of format {DUMP_FORMAT}), or is damaged")
    return content


@contextlib.contextmanager
def _watch(network: nn.Module) -> Iterator[list[str]]:
    """Names of modules, in order, as they give something that is not finite."""
    bad: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = output if isinstance(output, (list, tuple)) else [output]
        if any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
            bad.append(name)

    hooks = [
        module.register_forward_hook(lambda _module, _input, output, name=name: look(name, output))
        for name, module in network.named_modules()
    ]
    try:
        yield bad
    finally:
        for hook in hooks:
            hook.remove()


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if precision not in _AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, _AUTOCAST[precision])
