"""Shared paths and small builders."""

import os
from pathlib import Path

import pytest
import torch

import msn
from msn.method.network import MSN

ROOT = Path(__file__).parents[1]
GOLDEN = {
    "default": Path(msn.__file__).parent / "golden" / "golden_default.safetensors",
    "no_sinkhorn": ROOT / "tests" / "golden" / "golden_no_sinkhorn.safetensors",
    "wide": ROOT / "tests" / "golden" / "golden_wide.safetensors",
}

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads that wait for one another's would take ten times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start
    torch.set_num_threads(1)

SMALL_MODEL = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
}
SMALL_HEAD = {"hidden_dim": 32, "output_dim": 16, "use_batch_norm": True}


@pytest.fixture
def small_network() -> MSN:
    """Two blocks at 16 px, ten prototypes, float64."""
    torch.manual_seed(0)
    return MSN(model=SMALL_MODEL, head=SMALL_HEAD, num_prototypes=10).double()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Captured file names may be no text, which pytest-xdist cannot send to its main process."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode())
        for title, text in report.sections
    ]
    return report
