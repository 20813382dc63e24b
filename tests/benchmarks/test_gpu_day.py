"""The program for a day on a GPU, in small on a CPU: parts, what fails, going on."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_day

ROW = dict.fromkeys(
    ("batch", "chunk_size", "ms", "predicted_ms", "images_per_s", "mfu_of_989", "peak_gib",
     "forecast_gib", "first_step_s"), 1,
)  # fmt: skip


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Parts that were run; `tests` fails."""
    ran = []

    def one(part):
        ran.append(part)
        if part == "tests":
            return "exit 1: no"
        gpu_day._write(tmp_path / f"{part}.json", ROW)
        return None

    monkeypatch.setattr(gpu_day, "_one", one)
    return ran


def test_a_part_that_fails_loses_nothing_and_alone_is_run_again(monkeypatch, ran, tmp_path, capsys):
    parts = ["machine", "tests", "step_s16"]
    given = ["gpu_day.py", "--out", str(tmp_path), "--parts", ",".join(parts)]
    monkeypatch.setattr(sys, "argv", given)
    gpu_day.main()
    gpu_day.main()
    assert ran == [*parts, "tests"]
    assert "tests: exit 1: no" in capsys.readouterr().out
    table = (tmp_path / "gpu_day.md").read_text()
    assert "| s16 | 1 | 1 | 1.0 |" in table
    assert "## machine" in table


def test_an_unknown_part_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "--out", str(tmp_path), "--parts", "step"])
    with pytest.raises(SystemExit, match="no part step; there are machine, verify"):
        gpu_day.main()


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["machine", "step_b16_1024", "trace", "views", "equal", "features"]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the program itself runs there")
def test_each_part_runs_in_small(monkeypatch, part):
    monkeypatch.setattr(gpu_day, "SMALL", True)
    result = gpu_day.PARTS[part][0]()
    assert json.loads(json.dumps(result))
    if part == "step_b16_1024":
        assert (result["batch"], result["chunk_size"]) == (8, 4)
        assert result["forecast_gib"] > 0
