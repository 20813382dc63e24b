"""Runs of several processes, started as users start them: equal to one, stopped by one signal."""

import os
import subprocess
import sys

import pytest
import torch

from msn.training.checkpointing import newest_checkpoint
from msn.training.preemption import EXIT_CODE
from msn.weights import read_weights
from tests.commands.conftest import TINY
from tests.conftest import ROOT
from tests.method.test_distributed import free_port

PROGRAM = str(ROOT / "tests" / "commands" / "disturbed_train.py")
ARGUMENTS = [
    *TINY,
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=3",
    "trainer.precision=64-true",
    "callbacks.checkpoint.every_n_epochs=1",
]
# What a BatchNorm takes away again: the gradient is rounding alone, of which AdamW makes whole
# steps; tests/method/test_distributed.py compares these too, in double precision.
NO_TRUE_GRADIENT = (
    *("trunk.norm.bias", "head.fc1.bias", "head.fc2.bias"),
    *("head.bn1.running_mean", "head.bn2.running_mean"),
)


def start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end(process):
    out = process.communicate(timeout=300)[0]
    return process.returncode, out


def torchrun(*arguments, **environment):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    return end(start(*launcher, *arguments, **environment))


def srun(*arguments, **environment):
    """What srun --ntasks=2 does, for Lightning and for us."""
    common = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "msn",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **environment,
    }
    processes = [
        start(PROGRAM, *arguments, **common, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
        for i in range(2)
    ]
    return [end(process) for process in processes]


def state(directory):
    return torch.load(newest_checkpoint(directory / "checkpoints"), weights_only=True)


@pytest.mark.slow
def test_stopped_on_two_processes_and_resumed_on_two_and_one_it_equals_one_process(tmp_path):
    """torchrun, a signal to process 1; srun, again; alone: to rounding what one process gives."""
    code, out = end(start(PROGRAM, *ARGUMENTS, f"run.dir={tmp_path / 'straight'}"))
    assert code == 0, out
    straight = state(tmp_path / "straight")
    run = [*ARGUMENTS, f"run.root={tmp_path}"]
    directory = tmp_path / "digits" / "slurm-4711-0"
    code, out = torchrun(PROGRAM, *run, "run.name=slurm-4711-0", DISTURB="1:4:SIGTERM")
    assert code != 0
    assert out.count("interrupted: saved") == 1, out
    # The flag is exchanged in the background of one step, so all stop one step after the signal.
    assert newest_checkpoint(directory / "checkpoints").name == "epoch-1-step-5.ckpt"
    ended = srun(*run, DISTURB="1:7:SIGUSR1", PATH=str(tmp_path))  # PATH: no scontrol there
    assert [code for code, _ in ended] == [EXIT_CODE] * 2, ended
    assert "resuming from" in ended[0][1]
    assert "job 4711 not requeued: there is no scontrol here" in ended[0][1]
    assert "resuming" not in ended[1][1]
    code, out = end(start(PROGRAM, *run, "run.name=slurm-4711-0"))
    assert code == 0, out
    resumed = state(directory)
    assert resumed["global_step"] == straight["global_step"] == 9
    # Views are made in single precision, from batches of other sizes.
    for name, value in straight["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_network_cut_over_processes_trains_stops_resumes_and_is_exported(tmp_path):
    """FSDP2 on two processes against one process, in single precision."""
    single = [a for a in ARGUMENTS if "precision" not in a]
    code, out = end(start(PROGRAM, *single, f"run.dir={tmp_path / 'straight'}"))
    assert code == 0, out
    cut = [*single, "trainer.strategy=fsdp2", f"run.dir={tmp_path / 'cut'}"]
    _, out = torchrun(PROGRAM, *cut, DISTURB="1:4:SIGTERM")
    assert out.count("interrupted: saved") == 1, out
    code, out = torchrun("-m", "msn", "train", *cut)
    assert code == 0, out
    assert "resuming from" in out
    first, second = (state(tmp_path / name)["state_dict"] for name in ("straight", "cut"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if not name.endswith(NO_TRUE_GRADIENT):
            torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-3, msg=name)
    backbone = read_weights(tmp_path / "cut" / "backbone.safetensors").trunk
    for name, value in backbone.items():
        assert torch.equal(value, second[f"network.target.trunk.{name}"])


@pytest.mark.slow
def test_processes_that_lightning_starts_stop_together_and_go_on(tmp_path):
    """Lightning starts the second process itself."""
    two = [*ARGUMENTS, "trainer.devices=2"]
    code, out = end(start(PROGRAM, *two, f"run.dir={tmp_path / 'run'}", DISTURB="0:4:SIGTERM"))
    assert code == EXIT_CODE, out
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "epoch-1-step-5.ckpt"
    code, out = end(start(PROGRAM, *two, f"run.dir={tmp_path / 'run'}"))
    assert code == 0, out
    assert "resuming from" in out


def test_a_sweep_in_which_lightning_would_start_processes_is_refused(command, tmp_path):
    arguments = ["--multirun", *TINY, "trainer.devices=2", f"run.root={tmp_path / 'runs'}"]
    code, _, err = command("train", *arguments, "seed=1,2")
    assert code == 2
    lines = err.strip().splitlines()
    assert [line.partition(" --multirun cannot")[0] for line in lines] == [
        "error: seed=1:",
        "error: seed=2:",
    ]
    assert "torchrun" in err
    # Hydra's own record of the sweep is no run.
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["multirun.yaml"]
