import contextlib
import os
import sys

import pytest
from PIL import Image

from msn.__main__ import run_named

TINY = [
    "model.embed_dim=24",
    "model.depth=2",
    "method.head.hidden_dim=32",
    "method.head.output_dim=16",
    "method.num_prototypes=16",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.accelerator=cpu",
    "protocol.splits=2",
    "protocol.logistic.lambd_grid=null",
    "report=false",
    "callbacks.probe.references=100",
    "callbacks.probe.held_out=50",
]

# Where the table is not the point.
QUICK = [*TINY, "protocol.shots=[1]", "protocol.knn_neighbours=null"]


@pytest.fixture
def command(capfd, monkeypatch):
    """Run a command in this process: exit code, standard output, standard error."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name])
        code = 0
        try:
            run_named(name, list(arguments))
        except SystemExit as stop:
            code = stop.code
        out = capfd.readouterr()
        return code, out.out, out.err

    return run


@contextlib.contextmanager
def no_reader():
    """Standard output whose reader has ended, as in `msn COMMAND | true`."""
    reading, writing = os.pipe()
    os.close(reading)
    # Not a fixture: between its set-up and the test pytest takes standard output again.
    with os.fdopen(writing, "w") as stream, contextlib.redirect_stdout(stream):
        yield


@pytest.fixture
def images(tmp_path):
    """Three classes of eight small photographs each: DIR/CLASS/N.png."""
    for c in range(3):
        directory = tmp_path / "images" / f"class{c}"
        directory.mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (40, 36), (80 * c, 10 * i, 255 - 80 * c)).save(directory / f"{i}.png")
    return tmp_path / "images"
