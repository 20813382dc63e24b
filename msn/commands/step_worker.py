"""A measured step in a process of its own.

That gives each method its own memory to measure and its own allocator; the parent lets them step in
turns, so that a slow moment of the machine hits all alike.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from msn.commands.entry import one_line
from msn.commands.step_methods import METHODS, Case, Step
from msn.errors import UserError
from msn.training.cost import synchronise


class MethodFailed(UserError):
    """A method that ran out of memory, was killed or broke; others may go on without it."""


class Worker:
    """A method in its own process.

    Args:
        name: one of `METHODS`.
        case: what to measure.
    """

    def __init__(self, name: str, case: Case) -> None:
        self._name, context = name, multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, METHODS[name], case), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, question: str, number: int = 1) -> Any:
        """`steps` (seconds a step of `number` steps), `parts`, `peak_bytes` or `compiled`.

        Raises:
            MethodFailed: the method failed or its process died; its name stands first.
            UserError: a setting is wrong.
        """
        try:
            self._connection.send((question, number))
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=10)
            code = self._process.exitcode
            raise MethodFailed(
                f"{self._name}: its process died (exit code {code}): too little memory?"
            ) from None
        if isinstance(answer, MethodFailed):
            raise MethodFailed(f"{self._name}: {answer}")
        if isinstance(answer, UserError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(connection: Connection, make: Callable[[Case], Step], case: Case) -> None:
    _load_libraries()
    before, method = _memory("VmRSS"), None
    while True:
        try:
            question, number = connection.recv()
        except EOFError:
            return
        try:
            method = make(case) if method is None else method
            answer = _answer(method, question, number, torch.device(case.device), before)
        except Exception as error:  # whatever it is: the others shall go on without this method
            if os.environ.get("MSN_DEBUG"):
                traceback.print_exc()
            connection.send(_told(error))
            return
        connection.send(answer)


def _answer(
    method: Step, question: str, number: int, device: torch.device, before: int | None
) -> Any:
    if question == "steps":
        return _seconds_a_step(method, number, device)
    if question == "parts":
        return method.parts()  # type: ignore[attr-defined]  # asked of msn alone, which has them
    if question == "compiled":
        return getattr(method, "compiled", False)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = _memory("VmHWM")
    return None if peak is None or before is None else peak - before


def _told(error: Exception) -> UserError:
    """What the parent shall raise; errors of other packages may not travel between processes."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return MethodFailed("out of memory; a smaller batch_size or a chunk_size takes less")
    return MethodFailed(f"{type(error).__name__}: {one_line(error)}")


def _load_libraries() -> None:
    """Bring code and buffers of the matrix libraries into memory, so that they do not count."""
    layers = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.LayerNorm(256))
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
    F.gelu(layers(torch.randn(256, 256))).softmax(dim=-1).square().sum().backward()
    optimizer.step()


def _seconds_a_step(method: Step, number: int, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(number):
        method.step()
    synchronise(device)
    return (time.perf_counter() - start) / number


def _memory(name: str) -> int | None:
    """VmRSS or VmHWM (its greatest value) of this process in bytes; None where not told."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
