"""`benchmarks/step.py`: the product's step beside others."""

import io
import json
import os
import signal
from multiprocessing import Pipe
from threading import Thread

import pytest
import torch
from rich.console import Console

from benchmarks import step
from benchmarks.step_worker import MethodFailed, Worker, serve
from msn.commands.entry import compose, to_plain
from msn.commands.step import case_of
from msn.errors import UserError

TINY = [
    "experiment=digits",
    "model.depth=2",
    "batch_size=4",
    "rounds=1",
]


@pytest.mark.slow
def test_rows_measure_all_methods_of_one_case(script, tmp_path):
    json_file = f"json={tmp_path / 'rows.json'}"
    code, out, err = script(step, *TINY, "against=[eager_yardstick]", json_file)
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["msn", "eager_yardstick", "matmul_limit"]
    ours, limit = rows["msn"], rows["matmul_limit"]
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(4 / row["s_per_step"])
        flops = row["flops_per_s"] * row["s_per_step"]
        assert flops == pytest.approx(ours["flops_per_s"] * ours["s_per_step"])
        assert row["share_of_limit"] == pytest.approx(row["flops_per_s"] / limit["flops_per_s"])
    parts = ours["parts"]
    assert list(parts) == ["views", "target", "anchors", "loss", "backward", "optimiser", "ema"]
    assert min(parts.values()) > 0
    assert ours["peak_bytes"] > 0
    assert "backward" in out
    for row in rows.values():
        settings = [row[key] for key in ("chunk_size", "compile", "patch_drop")]
        assert settings == [None, "auto", 0.15]


def settings_of(*changes):
    settings = to_plain(compose("bench", ["what=step", *TINY, *changes]))
    return {**settings, "against": ["eager_yardstick", "lightly"]}


class FakeWorker:
    """Answers at once; what it is told to break breaks."""

    broken: dict[str, str] = {}
    closed: list[str] = []

    def __init__(self, name, make, case):
        self.name = name

    def ask(self, question, number=1):
        if self.broken.get(self.name) == question:
            raise MethodFailed(f"{self.name}: out of memory")
        answers = {
            "parts": dict.fromkeys(("views", "backward"), 0.1),
            "peak_bytes": 5,
            "compiled": False,
        }
        return answers.get(question, 1.0)

    def close(self):
        self.closed.append(self.name)


@pytest.fixture
def fake_workers(monkeypatch):
    monkeypatch.setattr(step, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "broken", {})
    monkeypatch.setattr(FakeWorker, "closed", [])
    monkeypatch.setattr(step, "measure_matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(step, "available", lambda kind: ["eager_yardstick", "lightly"])
    return FakeWorker


@pytest.mark.parametrize("question", ["peak_bytes", "steps"])
def test_a_comparison_that_fails_is_left_out_and_named_and_the_others_stay(fake_workers, question):
    fake_workers.broken = {"eager_yardstick": question}
    shown = io.StringIO()
    rows = step.run(settings_of(), Console(file=shown))
    assert [row["name"] for row in rows] == ["msn", "lightly", "matmul_limit"]
    (line,) = [line for line in shown.getvalue().splitlines() if "left out" in line]
    assert line == "left out: eager_yardstick: out of memory"
    assert sorted(fake_workers.closed) == ["eager_yardstick", "lightly", "msn"]


def test_without_msn_there_is_nothing_to_compare(fake_workers):
    fake_workers.broken = {"msn": "parts"}
    with pytest.raises(UserError, match="msn: out of memory"):
        step.run(settings_of(), Console(file=io.StringIO()))
    assert fake_workers.closed == ["msn"]


def told(make):
    """What a process sends when its method cannot be made."""
    ours, theirs = Pipe()
    serving = Thread(target=serve, args=(theirs, make, case_of(settings_of())))
    serving.start()
    ours.send(("steps", 1))
    answer = ours.recv()
    serving.join()
    return answer


def test_a_process_tells_mistakes_as_they_are_and_failures_by_their_kind():
    def raising(error):
        def make(case):
            raise error

        return make

    mistake = told(raising(UserError("chunk_size must be so")))
    assert type(mistake) is UserError
    assert str(mistake) == "chunk_size must be so"
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()):
        failure = told(raising(error))
        assert isinstance(failure, MethodFailed)
        assert "out of memory; a smaller batch_size" in str(failure)
    assert str(told(raising(TypeError("no such\nthing")))) == "TypeError: no such"


def killed(case):
    os.kill(os.getpid(), signal.SIGKILL)


def full(case):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
def test_processes_that_die_or_run_out_of_memory_say_which_method_it_was():
    case = case_of(settings_of())
    for make, line in {killed: "its process died (exit code -9)", full: "out of memory"}.items():
        name = make.__name__
        worker = Worker(name, make, case)
        with pytest.raises(MethodFailed) as error:
            worker.ask("steps")
        worker.close()
        assert str(error.value).startswith(f"{name}: {line}")


def test_each_row_says_the_precision_it_was_measured_in(fake_workers):
    rows = step.run(settings_of("trainer.precision=64-true"), Console(file=io.StringIO()))
    precisions = {row["name"]: row["precision"] for row in rows}
    assert precisions == {
        "msn": "64-true",
        "eager_yardstick": "32-true",
        "lightly": "32-true",
        "matmul_limit": "64-true",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["against=[vissl]"], "allowed are [eager_yardstick, lightly, transformers]"),
        (["against=null"], "against=None: allowed are [eager_yardstick, lightly, transformers]"),
        (
            ["against=lightly"],
            "against=lightly: allowed are [eager_yardstick, lightly, transformers]",
        ),
        (["rounds=0"], "rounds must be a whole number >= 1"),
        (["round=1"], "unknown key round"),
        (["experiment=nope"], "nope"),
    ],
)
def test_mistakes_end_in_one_line(script, arguments, message):
    code, _, err = script(step, *arguments)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
