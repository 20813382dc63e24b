"""Blocks of work on threads that each compute alone.

Parallel operations of torch wait for their slowest thread each time, which costs most of the time
on a machine that also does something else. Blocks wait for each other once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")


def in_threads(function: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """Results of a function for every item, in order, on as many threads as torch uses.

    Each item is computed by one thread whatever their number, so results do not depend on it.
    """
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        # A thread sets its own number and that of threads to come; only the first is wanted.
        torch.set_num_threads(before)
