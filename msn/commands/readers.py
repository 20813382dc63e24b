"""Who reads what a command prints may end first: `msn COMMAND | head -1`."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _LongLived:
    """An output stream that may lose its reader: what is printed then goes nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._reader():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def without_readers() -> Iterator[None]:
    """Within, `msn COMMAND | head -1` ends no work: a lost reader is no error."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _LongLived(out), _LongLived(err)
    try:
        yield
    finally:
        sys.stdout.flush()  # at the end of the process this would fail aloud
        sys.stdout, sys.stderr = out, err
