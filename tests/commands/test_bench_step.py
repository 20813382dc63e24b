"""`msn bench what=step`: rows, parts and mistakes."""

import io
import json
import os
import signal
from multiprocessing import Pipe
from threading import Thread

import pytest
import torch
from rich.console import Console

from msn.commands import bench_step, step_worker
from msn.commands.bench_step import case_of
from msn.commands.entry import compose, to_plain
from msn.commands.step_methods import METHODS, PARTS, MsnStep, product_type
from msn.commands.step_worker import MethodFailed, Worker
from msn.errors import UserError

TINY = [
    "experiment=digits",
    "model.depth=2",
    "batch_size=4",
    "rounds=1",
    "against=[eager_yardstick]",
]


@pytest.mark.slow
def test_rows_measure_all_methods_of_one_case(command, tmp_path):
    code, out, _ = command("bench", "what=step", *TINY, f"json={tmp_path / 'rows.json'}")
    assert code == 0
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
    return to_plain(compose("bench", ["what=step", *TINY, *changes]))


class FakeWorker:
    """Answers at once; what it is told to break breaks."""

    broken: dict[str, str] = {}
    closed: list[str] = []

    def __init__(self, name, case):
        self.name = name

    def ask(self, question, number=1):
        if self.broken.get(self.name) == question:
            raise MethodFailed(f"{self.name}: out of memory")
        answers = {"parts": dict.fromkeys(PARTS, 0.1), "peak_bytes": 5, "compiled": False}
        return answers.get(question, 1.0)

    def close(self):
        self.closed.append(self.name)


@pytest.fixture
def fake_workers(monkeypatch):
    monkeypatch.setattr(bench_step, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "broken", {})
    monkeypatch.setattr(FakeWorker, "closed", [])
    monkeypatch.setattr(bench_step, "measure_matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench_step, "available", lambda: list(METHODS))
    return FakeWorker


@pytest.mark.parametrize("question", ["peak_bytes", "steps"])
def test_a_comparison_that_fails_is_left_out_and_named_and_the_others_stay(fake_workers, question):
    fake_workers.broken = {"eager_yardstick": question}
    shown = io.StringIO()
    rows = bench_step.run(
        {**settings_of(), "against": ["eager_yardstick", "lightly"]}, Console(file=shown)
    )
    assert [row["name"] for row in rows] == ["msn", "lightly", "matmul_limit"]
    (line,) = [line for line in shown.getvalue().splitlines() if "left out" in line]
    assert line == "left out: eager_yardstick: out of memory"
    assert sorted(fake_workers.closed) == ["eager_yardstick", "lightly", "msn"]


def test_without_msn_there_is_nothing_to_compare(fake_workers):
    fake_workers.broken = {"msn": "parts"}
    with pytest.raises(UserError, match="msn: out of memory"):
        bench_step.run(settings_of(), Console(file=io.StringIO()))
    assert fake_workers.closed == ["msn"]


def told(make):
    """What a process sends when its method cannot be made."""
    ours, theirs = Pipe()
    serving = Thread(target=step_worker._serve, args=(theirs, make, case_of(settings_of())))
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
def test_processes_that_die_or_run_out_of_memory_say_which_method_it_was(monkeypatch):
    monkeypatch.setitem(METHODS, "eager_yardstick", killed)
    monkeypatch.setitem(METHODS, "lightly", full)
    lines = {"eager_yardstick": "its process died (exit code -9)", "lightly": "out of memory"}
    for name, line in lines.items():
        worker = Worker(name, case_of(settings_of()))
        with pytest.raises(MethodFailed) as error:
            worker.ask("steps")
        worker.close()
        assert str(error.value).startswith(f"{name}: {line}")


@pytest.mark.parametrize(
    ("precision", "weights", "views"),
    [
        ("64-true", torch.float64, torch.float64),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("32-true", torch.float32, torch.float32),
    ],
)
def test_a_step_is_measured_in_its_precision(precision, weights, views):
    method = MsnStep(case_of(settings_of(f"trainer.precision={precision}")))
    method.step()
    method.parts()
    assert {view.dtype for view in method.views} == {views}
    assert {view.dtype for view in method._make_views()} == {views}
    parameters = list(method.module.network.parameters())
    assert {p.dtype for p in parameters} == {weights}
    assert product_type(precision) == views  # of the matrix rate beside it


def test_each_row_says_the_precision_it_was_measured_in(fake_workers):
    rows = bench_step.run(settings_of("trainer.precision=64-true"), Console(file=io.StringIO()))
    precisions = {row["name"]: row["precision"] for row in rows}
    assert precisions == {
        "msn": "64-true",
        "eager_yardstick": "32-true",
        "matmul_limit": "64-true",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch_size=1"], "batch_size must be a whole number >= 2"),
        (["rounds=0"], "rounds must be a whole number >= 1"),
        (["against=[vissl]"], "allowed are [eager_yardstick, lightly]"),
        (["against=null"], "against=None: allowed are [eager_yardstick, lightly]"),
        (["against=lightly"], "against=lightly: allowed are [eager_yardstick, lightly]"),
        (["chunk_size=abc"], "chunk_size must be a whole number >= 1, got 'abc'"),
        (["chunk_size=0"], "chunk_size must be a whole number >= 1, got 0"),
        (["compile=perhaps"], "compile must be true, false or auto"),
        (["rounds=abc"], "rounds must be a whole number >= 1, got 'abc'"),
        (["data.views.rand_views=abc"], "data.views.rand_views must be a whole number"),
        (["trainer.precision=8-true"], "trainer.precision must be in"),
        (["data.views.rand_views=-1"], "rand_views=-1"),
        (["experiment=nope"], "nope"),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, message):
    code, _, err = command("bench", "what=step", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
