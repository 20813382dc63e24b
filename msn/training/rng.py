"""States of the global random generators as plain data.

No draw of a training run depends on them (order, views and masks are functions of the seed), but
whatever a user adds may.
"""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from msn.method.distributed import num_processes


def random_state() -> dict[str, Any]:
    """States of Python, NumPy, torch and this process's CUDA device, plain data."""
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
