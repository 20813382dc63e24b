"""The tests of tests/cuda, in a process where no backward pass has run before."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(2400)  # the slow ones take five minutes of one core
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_cuda_code_runs_on_fake_tensors(which):
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", which, "tests/cuda"],
        cwd=ROOT,
        env={**os.environ, "MSN_FAKE_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "passed" in ended.stdout or "skipped" in ended.stdout
