"""A measured step in a process of its own.

That gives each method its own memory to measure and its own allocator; the parent lets them step in
turns, so that a slow moment of the machine hits all alike.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from msn.commands.step_methods import METHODS, Case, Step
from msn.errors import UserError
from msn.training.rate import synchronise


class Worker:
    """A method in its own process.

    Args:
        name: one of `METHODS`.
        case: what to measure.
    """

    def __init__(self, name: str, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, case), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str, number: int = 1) -> Any:
        """`steps` (seconds a step of `number` steps), `parts`, `peak_bytes` or `compiled`.

        Raises:
            UserError: what went wrong in the process.
        """
        try:
            self._connection.send((question, number))
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError):
            raise UserError("a measured process ended: too little memory?") from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(connection: Connection, name: str, case: Case) -> None:
    device = torch.device(case.device)
    _load_libraries()
    before = _memory("VmRSS")
    try:
        method = METHODS[name](case)
    except UserError as error:
        connection.recv()
        connection.send(error)
        return
    while True:
        try:
            question, number = connection.recv()
        except EOFError:
            return
        if question == "steps":
            connection.send(_seconds_a_step(method, number, device))
        elif question == "parts":
            connection.send(method.parts())  # type: ignore[attr-defined]
        elif question == "compiled":
            connection.send(getattr(method, "compiled", False))
        elif device.type == "cuda":
            connection.send(torch.cuda.max_memory_allocated())
        else:
            peak = _memory("VmHWM")
            connection.send(None if peak is None or before is None else peak - before)


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
