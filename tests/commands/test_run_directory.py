"""One process per directory; what stands there half made or damaged is taken up, and said."""

import json
import os
import signal

import pytest
from omegaconf import OmegaConf

from msn.commands import run_directory
from msn.commands.run_directory import LOCK_FILE, choose_run_directory, forget_directory
from msn.errors import UserError
from msn.files import write_checkpoint

RUN = {"root": "runs", "experiment": "digits", "name": None}


@pytest.fixture(autouse=True)
def left():
    yield
    forget_directory()


def chosen(path, *, training=True, mode="auto"):
    config = {"run": {**RUN, "dir": str(path)}, "resume": {"mode": mode}}
    if training:
        config["trainer"] = {}
    return choose_run_directory(OmegaConf.create(config))


def in_child(act):
    """Start a copy of this process that acts, says so, and waits to be killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            os.write(writing, b"done")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(reading, 4) == b"done"
    os.close(reading)
    os.close(writing)
    return child


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("there", [False, True])
def test_a_second_process_is_refused_by_name_until_the_first_ends(tmp_path, there):
    path = tmp_path / "run"
    if there:
        path.mkdir()
        (path / "run.json").write_text('{"status": "unfinished"}')
    child = in_child(lambda: chosen(path).reserve())
    host = run_directory.platform.node()
    with pytest.raises(UserError, match=f"run is in use by process {child} on {host}: wait"):
        chosen(path).reserve()
    end(child)
    assert (path / LOCK_FILE).exists()  # left behind, and nobody's
    chosen(path).reserve()
    forget_directory()
    assert not (path / LOCK_FILE).exists()


def test_processes_of_one_run_share_its_directory(tmp_path, monkeypatch):
    child = in_child(lambda: chosen(tmp_path / "run").reserve())
    monkeypatch.setenv(run_directory.ENVIRONMENT, json.dumps([str(tmp_path / "run"), None]))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert chosen(tmp_path / "elsewhere").reserve().path == tmp_path / "run"
    end(child)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(run_directory.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_directory.fcntl, "lockf", refuse)
    assert chosen(tmp_path / "run").reserve().path.is_dir()
    assert "cannot be locked: No locks available" in caplog.text


def test_a_directory_of_a_mistake_is_given_back_with_its_lock(tmp_path):
    run = chosen(tmp_path / "a" / "run").reserve()
    with pytest.raises(UserError), run.given_back_on_failure():
        raise UserError("a mistake")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_or_a_full_disk_left_is_taken_up(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir()
    (path / LOCK_FILE).touch()
    (path / ".run.json.1234.tmp").touch()
    run = chosen(path).reserve()

    def full(place, write):
        if place.name == "config.yaml":
            raise OSError(28, "No space left on device")
        place.write_text("{}")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_atomically", full)
        with pytest.raises(OSError, match="No space"):
            run.create(OmegaConf.create())
    assert (path / "run.json").exists()
    chosen(path).reserve()
    (path / "run.json").unlink()
    (path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds no run"):
        chosen(path)


def test_a_run_json_that_is_a_folder_is_a_line(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    write_checkpoint(tmp_path / "checkpoints" / "epoch-1-step-3.ckpt", {})
    (tmp_path / "run.json").mkdir()
    with pytest.raises(UserError, match="run.json is not a file: remove it, or choose another"):
        chosen(tmp_path)


def test_a_lost_configuration_is_said(tmp_path, caplog):
    run = chosen(tmp_path / "run").reserve()
    run.create(OmegaConf.create())
    chosen(tmp_path / "run").reserve()
    assert caplog.text == ""
    (tmp_path / "run" / "config.yaml").unlink()
    chosen(tmp_path / "run").reserve()
    assert caplog.text.count("config.yaml is missing: writing it again") == 1


@pytest.mark.parametrize("content", ["{", "[]", "\0\0", "[" * 100_000])
def test_a_damaged_run_json_is_said_and_written_again(tmp_path, caplog, content):
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "epoch-1-step-3.ckpt"
    write_checkpoint(checkpoint, {})
    run = chosen(tmp_path).reserve()
    assert run.resume_from == checkpoint
    assert caplog.text.count("run.json is damaged: writing it again") == 1
    run.create(OmegaConf.create())
    assert (tmp_path / "config.yaml").is_file()
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "unfinished"}
    with pytest.raises(UserError, match="resume=never"):
        chosen(tmp_path, mode="never")


@pytest.mark.parametrize(
    ("checkpoint", "status"),
    [(None, "{"), ("damaged", "{"), ("pipe", "{"), ("damaged", None), ("pipe", None)],
)
def test_a_run_without_a_whole_checkpoint_begins_again_and_keeps_the_old(
    tmp_path, caplog, checkpoint, status
):
    if status is not None:
        (tmp_path / "run.json").write_text(status)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.csv").write_text("step\n3\n")
    file = tmp_path / "checkpoints" / "epoch-1-step-3.ckpt"
    if checkpoint == "damaged":
        file.write_bytes(b"PK")
    if checkpoint == "pipe":
        os.mkfifo(file)
    for number in (1, 2):
        run = chosen(tmp_path).reserve()
        assert run.resume_from is None
        run.begin_again()
        aside = tmp_path / f"before-{number}"
        assert f"starts again from step 0; its files are kept in {aside}" in caplog.text
        assert (aside / "metrics.csv").read_text() == "step\n3\n"
        assert not (tmp_path / "metrics.csv").exists()
        assert (aside / "checkpoints").exists() == (checkpoint is not None and number == 1)
        (tmp_path / "metrics.csv").write_text("step\n3\n")
    if checkpoint == "pipe":
        assert "not a regular file" in caplog.text
    (tmp_path / "run.json").unlink()
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "epoch-1-step-3.ckpt").touch()
    with pytest.raises(UserError, match="resume=never"):
        chosen(tmp_path, mode="never")
    with pytest.raises(UserError, match="holds no run"):
        chosen(tmp_path, training=False)


def test_a_finished_run_without_its_report_says_how_to_make_it(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    with pytest.raises(UserError, match=r"finished run.*msn report runs="):
        chosen(tmp_path)
    (tmp_path / "report.html").touch()
    with pytest.raises(UserError, match="choose another run.name or run.dir$"):
        chosen(tmp_path)


def test_an_evaluation_leaves_an_unfinished_training_run_alone(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "unfinished"}')
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds a training run"):
        chosen(tmp_path, training=False)
