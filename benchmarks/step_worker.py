"""A measured step in a process of its own.

That gives each method its own memory to measure and its own allocator; the parent lets them step in
turns, so that a slow moment of the machine hits all alike.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

from msn.commands.entry import one_line
from msn.commands.step import Case, Step, memory_of_process, peak_memory, seconds_per_step
from msn.errors import UserError


class MethodFailed(UserError):
    """A method that ran out of memory, was killed or broke; others may go on without it."""


class Worker:
    """A method in its own process.

    Args:
        name: of the method, in messages.
        make: makes it; a class or function of a module, for it travels by name.
        case: what to measure.
    """

    def __init__(self, name: str, make: Callable[[Case], Step], case: Case) -> None:
        self._name, context = name, multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, case), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str, number: int = 1) -> Any:
        """`steps` (seconds per step of `number` steps), `parts`, `peak_bytes` or `compiled`.

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


def serve(connection: Connection, make: Callable[[Case], Step], case: Case) -> None:
    """Make a method and answer questions on it until the other end closes."""
    _load_libraries()
    before, method = memory_of_process("VmRSS"), None
    while True:
        try:
            question, number = connection.recv()
        except EOFError:
            return
        try:
            method = make(case) if method is None else method
            answer = _answer(method, question, number, torch.device(case.device), before)
        except Exception as error:  # whatever it is: the others go on without this method
            if os.environ.get("MSN_DEBUG"):
                traceback.print_exc()
            connection.send(_told(error))
            return
        connection.send(answer)


def _answer(
    method: Any, question: str, number: int, device: torch.device, before: int | None
) -> Any:
    if question == "steps":
        return seconds_per_step(method, number, device)
    if question == "parts":
        return method.parts()  # asked of msn alone, which has them
    if question == "compiled":
        return getattr(method, "compiled", False)
    return peak_memory(device, before)


def _told(error: Exception) -> UserError:
    """What the parent raises; errors of other packages may not travel between processes."""
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
