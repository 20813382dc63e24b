"""The guard: skip non-finite steps; if they persist, dump one, which `msn replay` repeats."""

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from msn.data.sampler import BatchKey
from msn.data.views import Views
from msn.errors import UserError
from msn.files import write_checkpoint
from msn.method.optim import FiniteCheck
from msn.schema import as_argument
from msn.training.base import PretrainingModule
from msn.training.checkpointing import accumulated, ends_step
from msn.training.module import build_module
from msn.training.strategy import whole_state
from msn.training.trainer import data_of

_VIEWS = ("target", "rand", "focal")
_TYPES = {"64-true": torch.float64}
_AUTOCAST = {"bf16-mixed": torch.bfloat16}


class Reproduction(NamedTuple):
    """A step repeated from a dump."""

    step: int
    epoch: int
    batch: int
    recorded: list[tuple[float, float]]  # loss and gradient norm of each process then
    loss: float  # mean over the joined batch
    grad_norm: float  # of the learner; not finite if any gradient is not
    weights: list[str]  # parameters that were not finite before the step
    first: str | None  # the first module, in forward order, whose output is not finite
    images: list[int]  # images of the training set that give non-finite outputs

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return all(torch.tensor([self.loss, self.grad_norm]).isfinite())


def reproduce(path: Path, *, device: torch.device, chunk_size: int | None) -> Reproduction:
    """Repeat the step of a dump, with the batches of all processes joined.

    Args:
        path: the file of any process; those of the others are beside it.
        device: where to compute; the same kind as then reproduces exactly.
        chunk_size: images per trunk pass, for a joined batch that is too large; None takes all.

    Raises:
        UserError: if a file is missing, damaged or not a dump.
    """
    parts = _read(path)
    first = parts[0]
    module = build_module(**first["settings"], chunk_size=chunk_size, compile=False)
    network = module.network
    network.load_state_dict(first["network"])
    network.to(device, _TYPES.get(first["precision"], torch.float32)).train()
    weights = [n for n, value in network.named_parameters() if not value.isfinite().all()]
    target, rand, focal = (
        torch.cat([part["views"][name] for part in parts], dim=0 if name == "target" else 1)
        for name in _VIEWS
    )
    views = Views(target.to(device), rand.to(device), focal.to(device))
    with _watch(network) as bad, _autocast(first["precision"], device):
        loss, spoilt = module.repeat_step(views, parts)
    loss.backward()
    norm, *others = module.gradient_norms()
    norm = norm + 0 * sum(others)
    images = torch.tensor([image for part in parts for image in part["images"]])
    return Reproduction(
        step=first["step"],
        epoch=first["epoch"],
        batch=first["batch"],
        recorded=[(part["loss"], part["grad_norm"]) for part in parts],
        loss=loss.item(),
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
        raise UserError(f"{path} is not a dump of a step (of format {DUMP_FORMAT}), or is damaged")
    return content


@contextlib.contextmanager
def _watch(network: nn.Module) -> Iterator[list[str]]:
    """Collect, in forward order, the names of modules whose output is not finite."""
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


log = logging.getLogger(__name__)

DUMP_FORMAT = 1
_LAG_ON_CUDA = 2  # steps that the device may lag behind the host's reading
_NAMED = 8  # images that the log names; the dump has all


class _Seen(NamedTuple):
    """A step, its batch, and its figures on their way to the host."""

    step: int
    epoch: int
    batch: int  # the last one, if several were accumulated
    figures: Tensor  # in_row, loss and gradient norm of this process, bad [processes]
    copied: torch.cuda.Event | None


class Guard(Callback):
    """Skip every step whose loss or gradient is not finite; stop after several in a row.

    The device decides (`FiniteCheck`); the host reads the decision a few steps later and so never
    waits. All processes read the same and stop at the same step.

    Args:
        directory: of the run; dumps go to `dumps/step-S/rank-R.pt` below it.
        max_skipped: skipped steps in a row after which the run stops, >= 1.

    Raises:
        UserError: if `max_skipped` is < 1.
    """

    def __init__(self, *, directory: str | Path, max_skipped: int) -> None:
        if max_skipped < 1:
            raise UserError(f"callbacks.guard.max_skipped must be >= 1, got {max_skipped}")
        self.directory, self.max_skipped = Path(directory), max_skipped
        self._seen: deque[_Seen] = deque()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        assert isinstance(pl_module, PretrainingModule)
        pl_module.finite_check = FiniteCheck(self.max_skipped)

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PretrainingModule)
        if not ends_step(trainer, batch_idx):
            return
        self._seen.append(_see(trainer, pl_module, batch_idx))
        lag = _LAG_ON_CUDA if self._seen[-1].copied is not None else 0
        self._read(trainer, pl_module, lag)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        assert isinstance(pl_module, PretrainingModule)
        self._read(trainer, pl_module, 0)

    def _read(self, trainer: Trainer, module: PretrainingModule, lag: int) -> None:
        while len(self._seen) > lag:
            seen = self._seen.popleft()
            if seen.copied is not None:
                seen.copied.synchronize()
            in_row, loss, norm, *bad = seen.figures.tolist()
            if not any(bad):
                continue
            processes = [rank for rank, is_bad in enumerate(bad) if is_bad]
            images = _images(trainer, seen)
            log.warning(
                "step %d skipped: not finite in process %s (here loss %g, gradient norm %g); "
                "epoch %d, batch %d, here images %s",
                *(seen.step, ", ".join(map(str, processes)), loss, norm, seen.epoch, seen.batch),
                ", ".join(map(str, images[:_NAMED])) + (" ..." if len(images) > _NAMED else ""),
            )
            if in_row >= self.max_skipped:
                path = self._dump(trainer, module, seen)
                raise UserError(
                    f"{self.max_skipped} steps in a row were not finite, the last one step "
                    f"{seen.step}; weights are those before them: python -m msn replay "
                    f"{as_argument('dump', path)}"
                )

    def _dump(self, trainer: Trainer, module: PretrainingModule, seen: _Seen) -> Path:
        """Write all that a step needs: the weights, unchanged since, and its batch, made again."""
        _, loss, norm, *bad = seen.figures.tolist()
        views = _views(trainer, module, seen)
        content: dict[str, Any] = {
            "format": DUMP_FORMAT,
            "step": seen.step,
            "epoch": seen.epoch,
            "batch": seen.batch,
            "images": _images(trainer, seen),
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "loss": loss,
            "grad_norm": norm,
            "bad": bad,
            "precision": str(trainer.precision),
            # Of this step; the trainer's counter has moved on.
            **module.step_inputs(views, seen.step - 1),
            "settings": module.settings,
            "views": {name: getattr(views, name).cpu() for name in _VIEWS},
        }
        state = whole_state(module.network)
        if trainer.is_global_zero:
            content["network"] = state
        path = self.directory / "dumps" / f"step-{seen.step}" / f"rank-{trainer.global_rank}.pt"
        write_checkpoint(path, content)
        return path.with_name("rank-0.pt")


def _see(trainer: Trainer, module: PretrainingModule, batch_idx: int) -> _Seen:
    check = module.finite_check
    assert check is not None
    own = [check.in_row, module.loss_value.float(), module.grad_norm.float()]
    figures = torch.cat([torch.stack(own), check.bad])
    epoch = trainer.current_epoch
    if not figures.is_cuda:
        return _Seen(trainer.global_step, epoch, batch_idx, figures, None)
    host = torch.empty_like(figures, device="cpu", pin_memory=True)
    host.copy_(figures, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return _Seen(trainer.global_step, epoch, batch_idx, host, copied)


def _key(trainer: Trainer, seen: _Seen) -> BatchKey:
    """This process's images of a step, with all accumulated batches."""
    data, several = data_of(trainer), accumulated(trainer)
    sampler = data.sampler(rank=trainer.global_rank, world_size=trainer.world_size)
    first = seen.batch // several * several
    keys = sampler.keys(seen.epoch)[first : seen.batch + 1]
    return keys[-1]._replace(indices=np.concatenate([key.indices for key in keys]))


def _images(trainer: Trainer, seen: _Seen) -> list[int]:
    """This process's images of a step, as numbers in the training set."""
    return _key(trainer, seen).indices.tolist()


def _views(trainer: Trainer, module: PretrainingModule, seen: _Seen) -> Views:
    data, key = data_of(trainer), _key(trainer, seen)
    sampler = data.sampler(rank=trainer.global_rank, world_size=trainer.world_size)
    batch = data.loader(sampler).dataset[key]
    assert isinstance(module.dtype, torch.dtype)
    batch = data.transfer_batch_to_device(batch, module.device, 0)
    return data.make_views(batch, module.dtype)._replace(origin=key)
