"""One run is one run for wandb and TensorBoard, resumed or not, and says what came of it."""

import json
import os
import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from msn.commands.train import closed_loggers
from msn.errors import UserError
from msn.files import read_rows
from msn.training.loggers import ID_FILE, MetricsCSV, TensorBoardRun, WandbRun, tables
from tests.test_files import largest_file

ROW = {
    "backbone": "msn",
    "classifier": "logistic",
    "labels": "1",
    "splits": 2,
    "top1_mean": 0.5,
    "top1_std": 0.1,
    "lambda": None,
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "lowshot.json").write_text(json.dumps({"rows": [{**ROW, "more": 1}]}))
    (tmp_path / "verdicts.csv").write_text('step,epoch,verdict,line\n20,1,learning,"a, b"\n')
    return tmp_path


def test_the_tables_of_a_run_are_its_verdicts_and_its_lowshot_rows(run, tmp_path_factory):
    found = tables(run)
    assert found["verdicts"] == (
        ["step", "epoch", "verdict", "line"],
        [["20", "1", "learning", "a, b"]],
    )
    assert found["lowshot"] == (list(ROW), [list(ROW.values())])
    assert tables(tmp_path_factory.mktemp("empty")) == {}


def test_an_unknown_artifact_is_refused(tmp_path):
    with pytest.raises(UserError, match="none, results, backbone, got all"):
        WandbRun(save_dir=str(tmp_path), project="msn", name=None, artifacts="results,all")


def test_names_that_are_not_utf8_are_refused_or_replaced(tmp_path, wandb_runs):
    odd = os.fsdecode(b"\xe9")
    settings = {"save_dir": str(tmp_path / odd), "project": "msn", "name": None}
    with pytest.raises(UserError, match="wandb: cannot write into .* not UTF-8"):
        WandbRun(**settings, artifacts="none")
    with pytest.raises(UserError, match="tensorboard: cannot write into .* not UTF-8"):
        TensorBoardRun(save_dir=settings["save_dir"], resume_step=None)
    logger = WandbRun(**settings | {"save_dir": str(tmp_path)}, artifacts="none")
    logger.log_hyperparams({"data": {"root": odd, "size": 3}})
    logger.experiment.config.update.assert_called_once()
    assert logger.experiment.config.update.call_args.args == ({"data": {"root": "?", "size": 3}},)
    (tmp_path / "lowshot.json").write_text(json.dumps({"rows": [{**ROW, "backbone": odd}]}))
    assert tables(tmp_path)["lowshot"].rows[0][0] == "?"


@pytest.fixture
def wandb_runs(monkeypatch):
    """wandb that begins runs without a process, and goes on with one that nobody has finished."""
    wandb = pytest.importorskip("wandb")
    runs = []

    def init(**settings):
        runs.append(SimpleNamespace(id=f"id{len(runs)}", ended=[], config=MagicMock()))
        runs[-1].define_metric = runs[-1].log = lambda *a, **k: None

        def finish(exit_code=0):
            runs[-1].ended.append(exit_code)
            monkeypatch.setattr(wandb, "run", None)

        runs[-1].finish = finish
        monkeypatch.setattr(wandb, "run", runs[-1])
        return runs[-1]

    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.setattr(wandb, "init", init)
    return runs


def test_a_failed_run_is_closed_so_that_the_next_begins_one_of_its_own(tmp_path, wandb_runs):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        logger = WandbRun(
            save_dir=str(tmp_path / name), project="msn", name=None, artifacts="results"
        )
        run = SimpleNamespace(loggers=[logger])
        with pytest.raises(RuntimeError, match=f"id{'ab'.index(name)}"), closed_loggers(run):
            raise RuntimeError(logger.experiment.id)
    assert [run.ended for run in wandb_runs] == [[1], [1]]


@pytest.mark.slow
def test_a_resumed_wandb_run_keeps_its_id_offline(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def logger():
        return WandbRun(save_dir=str(run), project="msn", name=None, artifacts="results")

    first = logger()
    assert not (run / "wandb").exists()  # nothing begins before something is logged
    first.log_hyperparams({"seed": 1, "method": {"lr": 0.1}})
    first.log_metrics({"train/loss": 1.0}, step=1)
    kept = (run / ID_FILE).read_text().strip()
    assert first.experiment.id == kept
    assert first.experiment.config["method"]["lr"] == 0.1
    assert first.experiment.name == f"{run.parent.name}/{run.name}"
    first.experiment.finish()
    second = logger()
    second.log_metrics({"train/loss": 0.5}, step=2)
    assert second.experiment.id == kept
    second.log_results()
    pieces = sorted(place.name for place in (run / "wandb").glob("offline-run-*"))
    # Two pieces begun in one second are told apart by a "-1" at the end.
    one_run = re.compile(rf"offline-run-\d+_\d+-{kept}(-\d+)?")
    assert pieces
    assert all(one_run.fullmatch(piece) for piece in pieces), pieces


def test_a_resumed_run_hides_what_it_takes_again_in_tensorboard(run):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    first = TensorBoardRun(save_dir=str(run), resume_step=None)
    first.log_hyperparams({"seed": 1})
    for step in (10, 20, 30):
        first.log_metrics({"train/loss": float(step)}, step=step)
    first.finalize("success")
    second = TensorBoardRun(save_dir=str(run), resume_step=20)
    second.log_metrics({"train/loss": -30.0}, step=30)
    second.log_results()
    second.finalize("success")
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (10, 10.0),
        (20, 20.0),
        (30, -30.0),
    ]
    shown = events.Tags()["tensors"]
    assert {name.partition("/")[0] for name in shown} >= {"lowshot", "verdicts"}
    assert not list(run.rglob("hparams.yaml"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    logger = TensorBoardRun(save_dir=str(tmp_path), resume_step=None)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.save()
    with largest_file(10):
        for step in (2, 3):
            logger.log_metrics({"a": 1.0}, step=step)
            logger.save()
    logger.log_hyperparams({"seed": 1})
    logger.log_results()
    logger.finalize("success")
    assert caplog.text.count("tensorboard cannot be written") == 1


def test_rows_are_appended_and_late_columns_added(tmp_path):
    log = MetricsCSV(path=tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"a": 2.0, "b": 3.0}, step=2)
    rows = read_rows(tmp_path / "metrics.csv")
    assert rows == [{"step": "1", "a": "1.0", "b": ""}, {"step": "2", "a": "2.0", "b": "3.0"}]


def test_a_resumed_run_goes_on_in_the_same_file_without_doubles(tmp_path):
    path = tmp_path / "metrics.csv"
    for step in (1, 2, 3):
        MetricsCSV(path=path).log_metrics({"a": float(step)}, step=step)
    resumed = MetricsCSV(path=path)
    resumed.resume_at(2)
    resumed.log_metrics({"a": 30.0}, step=3)
    assert [row["a"] for row in read_rows(path)] == ["1.0", "2.0", "30.0"]


def test_what_is_logged_in_one_step_stands_in_one_row(tmp_path):
    log = MetricsCSV(path=tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, step=10)
    log.log_metrics({"a": 2.0}, step=20)
    log.log_metrics({"b": 3.0}, step=20)  # a new column, too
    log.log_metrics({"c": 4.0, "a": 5.0}, step=20)
    log.log_metrics({"b": 6.0}, step=30)
    rows = read_rows(tmp_path / "metrics.csv")
    assert [[row[name] for name in ("step", "a", "b", "c")] for row in rows] == [
        ["10", "1.0", "", ""],
        ["20", "5.0", "3.0", "4.0"],
        ["30", "", "6.0", ""],
    ]


def test_a_full_disk_ends_nothing_and_rows_are_written_when_it_takes_them(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path=path)
    log.log_metrics({"a": 1.0}, step=1)
    with largest_file(path.stat().st_size + 2):  # a part of the next row is written
        log.log_metrics({"a": 2.0}, step=2)
        log.log_metrics({"a": 3.0, "b": 3.0}, step=3)
    assert caplog.text.count("cannot be written: File too large; training goes on") == 1
    log.log_metrics({"a": 4.0}, step=4)
    rows = read_rows(path)
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [
        *(("1", "1.0", ""), ("2", "2.0", ""), ("3", "3.0", "3.0"), ("4", "4.0", "")),
    ]


def test_damaged_rows_are_left_out_on_resume_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,a\n1,1.0\n2,\xff\xfe\n3,3.0,9\n4\n\0\0\0\0,1\nx,1\n5,5.0\n\0\0\0\0\0")
    resumed = MetricsCSV(path=path)
    resumed.resume_at(5)
    assert [row["step"] for row in read_rows(path)] == ["1", "5"]
    assert "5 damaged rows are left out" in caplog.text
    assert caplog.text.count("metrics.csv: zero bytes, as after a crash of the machine") == 1
    resumed.log_metrics({"a": 6.0}, step=6)
    assert path.read_bytes().split() == [b"step,a", b"1,1.0", b"5,5.0", b"6,6.0"]
