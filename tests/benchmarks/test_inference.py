import io

import pytest
import torch
from rich.console import Console

from benchmarks import inference
from tests.weights.builders import make_trunk


def test_a_model_that_there_is_not_is_told(script):
    code, _, err = script(inference, "model=nope")
    assert (code, "allowed are" in err) == (2, True)


@pytest.mark.slow  # compiles
def test_every_batch_size_is_timed_in_every_mode(monkeypatch):
    assert inference.BATCH_SIZES == (1, 2, 4, 8, 64)
    monkeypatch.setattr(inference, "_LEAST_SECONDS", 0.01)
    monkeypatch.setattr(inference, "BATCH_SIZES", (1, 2))
    rows = inference.measure(make_trunk(), device=torch.device("cpu"), dtype=torch.float32)
    found = [(row["batch_size"], row["mode"]) for row in rows]
    modes = ("eager", "sdpa", "compiled")
    assert found == [(size, mode) for size in (1, 2) for mode in modes]
    assert all(row["speedup"] == 1 for row in rows if row["mode"] == "eager")
    for row in rows:
        speed = 1000 * row["batch_size"] / row["milliseconds"]
        assert row["images_per_second"] == pytest.approx(speed)
    text = io.StringIO()
    inference.show(rows, Console(file=text, width=120))
    sizes = [line.split()[1] for line in text.getvalue().splitlines()[4:-1]]
    assert sizes == [str(size) for size in inference.BATCH_SIZES]
