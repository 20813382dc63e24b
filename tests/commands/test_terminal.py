"""What a person sees in a terminal: pytest and log files have none."""

import os
import pty
import subprocess
import sys

import pytest

from tests.commands.conftest import TINY
from tests.conftest import ROOT


@pytest.mark.slow
def test_training_in_a_terminal_shows_a_bar_and_ends_with_the_run_directory(tmp_path):
    parent, child = pty.openpty()
    arguments = [*TINY, "protocol.knn_neighbours=null", f"run.dir={tmp_path / 'run'}"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # Linux says so when the other side is closed
            break
        if not part:
            break
        shown += part
    text = shown.decode(errors="replace")
    assert process.wait(timeout=60) == 0, text
    assert "Epoch" in text
    assert "images/s" in text
    assert "run directory: " in text.strip().splitlines()[-1]
