"""Who started the process, and how many devices and nodes that makes."""

import os

import pytest

from msn.errors import UserError
from msn.training.launch import Launch, fit_devices, join_launched_processes, read_launch

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
