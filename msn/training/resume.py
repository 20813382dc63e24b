"""What must be the same for a run to go on exactly, the check that it is, and the random states.

No draw of a training run depends on the global generators (order, views and masks are functions of
the seed), but whatever a user adds may.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from msn.errors import UserError
from msn.method.distributed import num_processes


def random_state() -> dict[str, Any]:
    """States of Python, NumPy, torch and this process's CUDA device, plain data."""
    # NPY002: a user's code may draw from NumPy's global generator, so its state is kept.
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_cuda else None,
    }


def gather_random_states() -> list[dict[str, Any]]:
    """`random_state` of every process, by rank; a collective."""
    state = random_state()
    if num_processes() == 1:
        return [state]
    states: list[dict[str, Any]] = [{} for _ in range(num_processes())]
    dist.all_gather_object(states, state)
    return states


def restore_random_state(states: list[dict[str, Any]], rank: int) -> None:
    """Take up this process's state; with another number of processes there is none to take up.

    Args:
        states: what `gather_random_states` gave.
        rank: of this process.
    """
    if len(states) != num_processes():
        return
    state = states[rank]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    legacy = (kind, np.array(keys, np.uint32), position, has_gauss, cached)
    np.random.set_state(legacy)  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# Groups of settings whose every value counts; the numbers that decide what a step does.
_WHOLE = ("model", "method", "data.views")
_SINGLE = (
    *("seed", "trainer.max_epochs", "trainer.limit_train_batches"),
    *("data.source", "data.hold_out", "data.split_seed", "data.use_labels", "data.image_size"),
    *("data.global_batch_size", "data.backend"),
)


def identity_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's numbers, by their full keys.

    Not among them, because they change no number: where files are, workers, processes, chunks;
    nor the precision and device, which a run may have to change.

    Args:
        settings: the resolved configuration of a training run.
    """
    flat = dict(_flat("", settings))
    # Moments of a network that is cut are stored in another order.
    sharded = flat.get("trainer.strategy") == "fsdp2"
    identity = {
        key: value
        for key, value in flat.items()
        if key in _SINGLE or any(key.startswith(f"{group}.") for group in _WHOLE)
    }
    return {**identity, "trainer.strategy": "fsdp2" if sharded else "auto"}


def check_same_run(
    checkpoint: Path,
    identity: Mapping[str, Any],
    shapes: Mapping[str, Tensor],
    *,
    force: bool,
) -> None:
    """Refuse to go on with a checkpoint of a run that was set up differently.

    Args:
        checkpoint: of the run so far.
        identity: `identity_of` the run now.
        shapes: the module's state now, of which the shapes are read.
        force: accept all differences under which the weights fit.

    Raises:
        UserError: that names the first key that differs.
    """
    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    before = content.get("msn", {}).get("identity")
    differing = [] if before is None else _differing(before, identity)
    if differing and not force:
        key, then, now = differing[0]
        more = f" ({len(differing)} keys differ)" if len(differing) > 1 else ""
        raise UserError(
            f"cannot resume {checkpoint}: {key} was {then} and is {now} now{more}; "
            "resume.force=true resumes all the same"
        )
    misfit = _misfit(content["state_dict"], shapes)
    if misfit is not None:
        key = next((key for key, *_ in differing if key.startswith(("model", "method"))), "?")
        raise UserError(
            f"cannot resume {checkpoint}: with another {key} its weights do not fit ({misfit}); "
            f"init={checkpoint} starts a new run from them"
        )


def _misfit(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> str | None:
    """The first tensor that is not in both states with the same shape, and its shapes."""
    for name in [*before, *(name for name in now if name not in before)]:
        shapes = [list(state[name].shape) if name in state else None for state in (before, now)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]}, must be {shapes[1]}"
    return None


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = [*before, *(key for key in now if key not in before)]
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(prefix, value)]
    dot = f"{prefix}." if prefix else ""
    return [pair for key, part in value.items() for pair in _flat(f"{dot}{key}", part)]
