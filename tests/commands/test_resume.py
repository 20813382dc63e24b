"""A run that was cut off goes on where it stood and ends with the numbers of one that was not."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from benchmarks.kill_resume import CLOCKS, differing
from msn.commands import train
from msn.commands.command_line import without_readers
from msn.files import read_rows
from msn.schema import as_argument
from msn.training.checkpointing import checkpoints, newest_checkpoint
from msn.training.preemption import EXIT_CODE
from tests.commands.conftest import TINY
from tests.conftest import ROOT
from tests.weights.zoo import save_hugging_face

# Three epochs of three steps; RuntimeErrors and signals come where `disturb` says.
ARGUMENTS = [
    *TINY,
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=3",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_epochs=1",
]


class Disturb(Callback):
    """Draws from the global generators in each step, as a user's code may, and acts after one."""

    def __init__(self, step=None, act=None):
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        noise = torch.rand(()) + float(np.random.rand())  # noqa: NPY002
        pl_module.network.prototypes.data.mul_(1 + 1e-3 * noise)
        if trainer.global_step == self.step:
            self.act()


@pytest.fixture
def run(command, monkeypatch):
    """Run train.py without the evaluation at its end, disturbed after a step."""

    def end(settings, directory, *_):
        directory.write_status("finished")

    monkeypatch.setattr(train, "finish", end)
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    # nohup and `&` in a script ignore them.
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}

    def go(*arguments, step=None, act=None):
        attach = train._attach

        def attach_too(config, trainer, *rest):
            attach(config, trainer, *rest)
            trainer.callbacks.insert(0, Disturb(step, act))

        with monkeypatch.context() as patch:
            patch.setattr(train, "_attach", attach_too)
            return command("train", *arguments)

    yield go
    for number, handler in before.items():
        signal.signal(number, handler)


def power_cut():
    raise RuntimeError("power cut")


def end_state(directory):
    return torch.load(newest_checkpoint(directory / "checkpoints"), weights_only=True)


def test_a_run_stopped_at_an_epoch_s_end_and_in_its_middle_ends_bit_equal(run, tmp_path):
    code, _, err = run(*ARGUMENTS, f"run.dir={tmp_path / 'straight'}")
    assert code == 0, err
    cut = [*ARGUMENTS, f"run.root={tmp_path}", "run.name=cut"]
    directory = tmp_path / "digits" / "cut"
    with pytest.raises(RuntimeError, match="power cut"):
        run(*cut, step=4, act=power_cut)  # goes back to the end of the first epoch
    assert [path.name for path in checkpoints(directory / "checkpoints")] == ["epoch-1-step-3.ckpt"]
    code, out, _ = run(*cut, step=5, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert code == EXIT_CODE
    assert "resuming from" in out
    assert newest_checkpoint(directory / "checkpoints").name == "epoch-1-step-5.ckpt"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    code, _, _ = run(*cut, "data.num_workers=2")
    assert code == 0
    assert json.loads((directory / "run.json").read_text())["status"] == "finished"
    straight, resumed = end_state(tmp_path / "straight"), end_state(directory)
    assert straight["global_step"] == 9
    assert set(differing(straight, resumed)) <= CLOCKS
    rows = [read_rows(path / "metrics.csv") for path in (tmp_path / "straight", directory)]
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]]
    assert [row["train/loss"] for row in rows[1]] == [row["train/loss"] for row in rows[0]]


def test_an_adaptation_that_was_cut_ends_bit_equal(run, tmp_path):
    """Frozen epoch, rates of the layers, and what the probe found before the first step."""
    save_hugging_face(tmp_path / "found", "dinov3_vit")
    own = [key for key in ARGUMENTS if not key.startswith(("model.", "method.num_prototypes"))]
    own += ["experiment=adapt", "data=digits", f"init={tmp_path / 'found'}"]
    code, _, err = run(*own, f"run.dir={tmp_path / 'straight'}")
    assert code == 0, err
    cut = [*own, f"run.dir={tmp_path / 'cut'}"]
    code, _, _ = run(*cut, step=5, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert code == EXIT_CODE
    code, out, _ = run(*cut)
    assert (code, "before the first step" in out) == (0, False)
    straight, resumed = (end_state(tmp_path / name) for name in ("straight", "cut"))
    assert set(differing(straight, resumed)) <= CLOCKS
    assert len(straight["optimizer_states"][0]["param_groups"]) == 2 + 2 * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_keyboard_or_a_closed_terminal_saves_and_names_the_way_on(run, tmp_path, number):
    where = [*ARGUMENTS, f"run.dir={tmp_path / 'run'}"]
    code, out, err = run(*where, step=2, act=lambda: os.kill(os.getpid(), number))
    assert code == EXIT_CODE
    assert "interrupted: saving after this step; once more ends at once" in err
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch-0-step-2.ckpt"
    assert f"interrupted: saved {checkpoint}; the same command with its run.name" in out
    assert f"run directory: {tmp_path / 'run'}" in out
    assert checkpoint.is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("finished", [False, True])
def test_a_signal_after_the_last_step_names_the_way_to_finish(
    run, monkeypatch, tmp_path, number, finished
):
    def interrupted(settings, directory, *_):
        if finished:
            directory.write_status("finished")
        os.kill(os.getpid(), number)
        pytest.fail("went on")

    monkeypatch.setattr(train, "finish", interrupted)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    directory = tmp_path / "it's, [1] (2)"
    where = [*TINY, "trainer.limit_train_batches=1", f"run.dir={directory}"]
    code, out, _ = run(*where)
    assert f"run directory: {directory}" in out
    if finished:
        assert code == 0
        argument = as_argument("runs", directory)
        assert f"without its report: python -m msn report {argument}\n" in out
        code, _, err = run(*where)
        assert (code, f"python -m msn report {argument} makes its report" in err) == (2, True)
        return
    assert code == EXIT_CODE
    argument = as_argument("checkpoint", directory)
    assert f"makes the table, or python eval_lowshot.py {argument}\n" in out
    monkeypatch.setattr(train, "finish", lambda s, d, *_: d.write_status("finished"))
    assert run(*where)[0] == 0
    assert json.loads((directory / "run.json").read_text())["status"] == "finished"


def test_a_signal_before_the_first_step_leaves_nothing_behind(run, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "_set_up", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    code, out, _ = run(*ARGUMENTS, f"run.dir={tmp_path / 'run'}")
    assert code == EXIT_CODE
    assert "interrupted: before the first step" in out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(train, "_describe_run", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    code, out, _ = run(*ARGUMENTS, f"run.dir={tmp_path / 'run'}")
    assert code == EXIT_CODE
    assert "interrupted: before the first step" in out


def test_a_reader_of_the_output_that_ends_ends_no_run(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            print("nobody", flush=True)
        with without_readers():
            for _ in range(2):
                print("nobody", flush=True)
        assert sys.stdout is stream


def test_a_run_without_a_checkpoint_begins_again_and_keeps_what_it_left(run, tmp_path, caplog):
    where = [*ARGUMENTS, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(RuntimeError, match="power cut"):
        run(*where, step=2, act=power_cut)
    code, _, err = run(*where)
    assert code == 0, err
    assert "starts again from step 0" in caplog.text
    steps = [int(row["step"]) for row in read_rows(tmp_path / "run" / "metrics.csv")]
    assert steps == [*range(1, 10)]
    assert read_rows(tmp_path / "run" / "before-1" / "metrics.csv")[0]["step"] == "1"


def test_a_run_without_run_json_goes_on_from_its_checkpoints(run, tmp_path, caplog):
    where = [*ARGUMENTS, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(RuntimeError, match="power cut"):
        run(*where, step=4, act=power_cut)
    (tmp_path / "run" / "run.json").unlink()
    code, out, err = run(*where)
    assert code == 0, err
    assert "epoch-1-step-3.ckpt" in out
    assert "run.json is missing: writing it again" in caplog.text


def test_variables_of_another_job_do_not_decide(run, command, monkeypatch, tmp_path, caplog):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(*ARGUMENTS, f"run.dir={tmp_path / 'run'}")
    assert code == 0, err
    assert "RANK, WORLD_SIZE set, but neither torchrun" in caplog.text
    assert "RANK" not in os.environ
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    command("eval_lowshot", "checkpoint=/nowhere")
    assert "RANK set, but neither torchrun" in caplog.text


def test_an_error_closes_the_loggers_and_ends_what_was_started(run, monkeypatch, tmp_path):
    ended = []

    @contextmanager
    def closed(trainer):
        try:
            yield
        finally:
            ended.append("loggers")

    monkeypatch.setattr(train, "closed_loggers", closed)
    monkeypatch.setattr(train, "end_started_processes", lambda trainer: ended.append("processes"))
    with pytest.raises(RuntimeError, match="power cut"):
        run(*ARGUMENTS, f"run.dir={tmp_path / 'run'}", step=1, act=power_cut)
    assert ended == ["processes", "loggers"]


def test_a_signal_between_the_last_step_and_the_table_is_obeyed(run, monkeypatch, tmp_path):
    # Within the training, but after its last look for a signal.
    monkeypatch.setattr(
        Disturb, "on_train_end", lambda *_: os.kill(os.getpid(), signal.SIGUSR1), raising=False
    )
    where = [*TINY, "trainer.limit_train_batches=1", f"run.dir={tmp_path / 'run'}"]
    assert run(*where)[0] == EXIT_CODE


def test_lightning_s_word_on_short_epochs_is_not_printed():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train._quieten()
        warnings.warn(
            "The number of training batches (2) is smaller than the logging interval "
            "Trainer(log_every_n_steps=10). Set a lower value for log_every_n_steps",
            stacklevel=1,
        )
    assert seen == []


def test_a_run_that_was_set_up_differently_is_not_resumed(run, tmp_path):
    where = [*ARGUMENTS, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(RuntimeError, match="power cut"):
        run(*where, step=4, act=power_cut)
    code, _, err = run(*where, "method.lr=0.1")
    assert code == 2
    assert "method.lr was 0.003 and is 0.1" in err
    code, out, _ = run(*where, "method.lr=0.1", "resume.force=true")
    assert code == 0
    assert "resuming from" in out


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run, tmp_path, caplog):
    where = [*ARGUMENTS, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(RuntimeError, match="power cut"):
        run(*where, step=7, act=power_cut)
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    code, out, _ = run(*where)
    assert code == 0
    assert f"{newest} is damaged (its checksum does not match): skipped" in caplog.text
    assert "epoch-1-step-3.ckpt" in out


def test_a_killed_data_worker_ends_the_run_in_one_line_and_it_can_go_on(run, tmp_path):
    where = [*ARGUMENTS, f"run.dir={tmp_path / 'run'}", "data.num_workers=1"]

    def kill_worker():
        multiprocessing.active_children()[0].kill()
        time.sleep(0.2)

    code, _, err = run(*where, step=4, act=kill_worker)
    assert code == 2
    assert re.search(r"error: DataLoader worker .* continues", err), err
    assert "Traceback" not in err
    code, out, _ = run(*where)
    assert code == 0
    assert "epoch-1-step-3.ckpt" in out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_a_step_out_of_memory_ends_in_one_line_and_goes_on_with_a_smaller_chunk(
    error, run, tmp_path
):
    where = [*ARGUMENTS, f"run.dir={tmp_path / 'run'}"]

    def full():
        raise error

    code, _, err = run(*where, step=4, act=full)
    assert code == 2, err
    (line,) = (line for line in err.splitlines() if "error: " in line)
    found = re.search(r"out of memory.*: (chunk_size=\d+) changes no number and takes", line)
    assert found, line
    assert line.endswith(f"run.dir={tmp_path / 'run'} continues from its last checkpoint")
    assert "Traceback" not in err
    code, out, _ = run(*where, found[1])
    assert code == 0
    assert "epoch-1-step-3.ckpt" in out


def test_a_step_out_of_memory_before_the_first_checkpoint_promises_none(run, tmp_path):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    code, _, err = run(*ARGUMENTS, f"run.dir={tmp_path / 'run'}", step=1, act=full)
    assert code == 2, err
    assert err.rstrip().endswith("starts again: nothing is saved yet")


@pytest.mark.slow
def test_a_limit_of_the_address_space_ends_training_in_one_line(tmp_path):
    """Cosines with very many prototypes, under a limit that lets everything else be."""
    command = [sys.executable, "train.py", *TINY, "method.num_prototypes=300000"]
    command += ["data.global_batch_size=1024", f"run.dir={tmp_path / 'run'}"]
    limited = ["bash", "-c", 'ulimit -v 6000000; exec "$@"', "bash", *command]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.search(r"out of memory \(.* GiB more were wanted\): ", line), line
    assert "data.global_batch_size" in line


def test_a_lost_data_mount_ends_the_run_in_one_line_and_it_can_go_on(run, tmp_path, images):
    away = tmp_path / "away"
    where = [*ARGUMENTS, "data=folder", f"data.root={images}", "data.global_batch_size=4"]
    where += [f"run.dir={tmp_path / 'run'}", "data.num_workers=0", "data.max_bad_fraction=0.1"]
    damaged = sorted(images.rglob("*.png"))[0]
    damaged.write_bytes(b"")
    code, _, err = run(*where, step=4, act=lambda: images.rename(away))
    assert code == 2
    assert "images cannot be read" in err
    assert "Traceback" not in err
    away.rename(images)
    code, out, err = run(*where)
    assert code == 0, err
    assert "epoch-1-step-3.ckpt" in out
    rows = (tmp_path / "run" / "bad_images.csv").read_text().splitlines()
    assert len(rows) == 2  # the heading, and what cannot be read now
    assert str(damaged.relative_to(images)) in rows[1]


def test_an_unfinished_run_is_not_touched_when_resume_is_never(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "unfinished"}')
    code, _, err = command("train", *TINY, f"run.dir={tmp_path / 'run'}", "resume=never")
    assert code == 2
    assert "unfinished run" in err


def test_a_directory_that_holds_something_else_is_refused(command, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    code, _, err = command("train", *TINY, f"run.dir={tmp_path}")
    assert code == 2
    assert "holds no run" in err


def test_three_runs_killed_at_random_moments_end_bit_equal():
    """The short form of benchmarks/kill_resume.py; kills come while steps and files are made."""
    script = [sys.executable, str(ROOT / "benchmarks" / "kill_resume.py"), "--runs=3", "--kills=1"]
    done = subprocess.run(
        script,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 runs bit-equal to the undisturbed one after" in done.stdout
