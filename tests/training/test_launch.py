"""Who started the process, and how many devices and nodes that makes."""

import os
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from msn.errors import UserError
from msn.training import launch
from msn.training.launch import (
    Launch,
    cluster_environment,
    fit_devices,
    ignore_left_overs,
    join_launched_processes,
    meeting,
    read_launch,
    starts_processes,
)
from tests.training.test_module import trainer_of
from tests.training.test_preemption import in_child

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2"}


def test_torchrun_and_srun_are_recognised(monkeypatch):
    assert read_launch({}) is None
    assert read_launch(TORCHRUN) == Launch("torchrun", 16, 8)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NAME", "msn")
    assert read_launch(SRUN) == Launch("srun", 4, 2)
    with pytest.raises(UserError, match="every node must have the same number"):
        read_launch({**SRUN, "SLURM_NTASKS": "5"})


def test_an_allocation_without_srun_is_no_launch():
    assert read_launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None


def test_what_was_started_decides_unless_devices_are_set():
    two_nodes = Launch("torchrun", 16, 8)
    assert fit_devices(two_nodes, "auto", 1) == (8, 2)
    assert fit_devices(two_nodes, 8, 2) == (8, 2)
    assert fit_devices(None, "auto", 1) == ("auto", 1)
    with pytest.raises(UserError, match="started by torchrun or srun"):
        fit_devices(None, 8, 2)


def test_srun_is_told_to_torch_in_the_words_of_torchrun(monkeypatch):
    slurm = {
        **SRUN,
        "SLURM_JOB_NAME": "msn",
        "SLURM_JOB_ID": "12345",
        "SLURM_NODELIST": "node[7-8]",
    }
    for name, value in {**slurm, "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    join_launched_processes(environment)
    found = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    assert found == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node7", "17345")
    alone = {"PATH": "/bin"}
    join_launched_processes(alone)
    assert alone == {"PATH": "/bin"}


def test_variables_of_another_job_are_forgotten_and_said(caplog, monkeypatch):
    monkeypatch.setattr(launch.rank_zero_only, "rank", 1)
    left = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    environment = {"PATH": "/bin", **left}
    ignore_left_overs(environment)
    assert environment == {"PATH": "/bin"}
    assert launch.rank_zero_only.rank == 0
    assert "RANK, WORLD_SIZE set, but neither torchrun (TORCHELASTIC_RUN_ID)" in caplog.text
    started = {**left, **TORCHRUN}
    ignore_left_overs(started)
    assert started == {**left, **TORCHRUN}


def test_a_job_without_srun_is_said_and_does_not_decide(caplog, monkeypatch):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "msn", "SLURM_NTASKS": "2"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    ignore_left_overs(os.environ)
    assert "SLURM job 7 has 2 tasks (SLURM_NTASKS), but srun has not started" in caplog.text
    trainer = trainer_of("runs", devices=2)
    assert trainer.world_size == 2
    assert starts_processes(trainer)
    assert not isinstance(cluster_environment(os.environ), SLURMEnvironment)


def test_waiting_for_others_is_said_and_ends(monkeypatch, capfd):
    monkeypatch.setattr(launch, "SAY_AFTER", 0.05)
    monkeypatch.setattr(launch, "GIVE_UP_AFTER", 0.2)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)

    def wait():
        with meeting(pytest.fail):
            time.sleep(20)

    assert in_child(wait) == 2
    said, error = capfd.readouterr().err.strip().splitlines()
    assert said.startswith("process 0 of 2 (WORLD_SIZE) waits for the others at h:1 (MASTER_ADDR")
    assert error.startswith("error: process 0 of 2 (WORLD_SIZE) waits")
    assert in_child(meeting(pytest.fail).__enter__) == 0


def test_processes_agree_within_a_meeting(monkeypatch):
    monkeypatch.setattr(launch, "starts_processes", lambda trainer: False)
    left = []
    strategy = SimpleNamespace(
        connect=lambda module: None,
        setup_environment=lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.5)),
        broadcast=lambda answer: answer,
    )
    trainer = SimpleNamespace(world_size=2, strategy=strategy, is_global_zero=True)
    assert launch.agree(trainer, None, lambda: "here", left.append) == "here"
    assert left == [signal.SIGTERM]


def test_no_started_process_outlives_an_error():
    with subprocess.Popen(["sleep", "60"]) as started:
        launcher = object.__new__(_SubprocessScriptLauncher)
        launcher.procs = [started]
        launch.end_started_processes(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
        assert started.poll() == -signal.SIGTERM


def waiting(ready):
    """Wait for a second process that never comes, in torch's own code, until a signal says 75."""
    with meeting(lambda number: os._exit(75)):
        threading.Timer(0.3, os.write, (ready, b"1")).start()
        dist.init_process_group("gloo", rank=0, world_size=2)


@pytest.mark.parametrize("number", launch._STOPPING)
def test_a_signal_ends_the_waiting(number, monkeypatch, free_port):
    """Python's handlers do not run within torch's wait."""
    handler = signal.getsignal(number)
    monkeypatch.setenv("MASTER_PORT", free_port)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    reading, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(number, signal.SIG_DFL)
            waiting(ready)
        finally:
            os._exit(1)
    assert os.read(reading, 1) == b"1"
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert signal.getsignal(number) == handler


def test_an_ignored_signal_stays_ignored_while_waiting():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with meeting(pytest.fail):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_a_port_that_is_taken_is_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with (
            pytest.raises(UserError, match=f"does not meet the others at 127.0.0.1:{port}"),
            meeting(pytest.fail),
        ):
            dist.init_process_group("gloo", rank=0, world_size=2)
