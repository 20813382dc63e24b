"""Signals: a flag at the first, an end at the second, a requeue where SLURM is there."""

import os
import signal
import time

import pytest

from msn.training import preemption
from msn.training.preemption import Preempted, Preemption, requeue_slurm_job


def in_child(act):
    """Exit status of a copy of this process that does something and would then go on."""
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def listen_and_send(*numbers, pause=0.0, fitting=True):
    def act():
        for number in numbers:  # pytest's own parent may have ignored it (nohup, a job with &)
            signal.signal(number, signal.SIG_DFL)
        callback = Preemption(requeue=True)
        callback.install()
        callback._is_fitting = fitting
        try:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(pause)
        except Preempted as stop:
            os._exit(50 + stop.requeue)
        os._exit(40 + callback.received)

    return act


KEYBOARD_AND_CLUSTER = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", [*KEYBOARD_AND_CLUSTER, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_is_a_flag_and_a_second_ends_the_process_at_once(number, monkeypatch):
    asked = 1 if number in KEYBOARD_AND_CLUSTER else 2
    assert in_child(listen_and_send(number)) == 40 + asked
    monkeypatch.setattr(preemption, "_SAME_SIGNAL_SECONDS", 0.01)
    assert in_child(listen_and_send(number, number, pause=0.05)) == 128 + number


def test_a_signal_that_comes_twice_counts_once():
    assert in_child(listen_and_send(signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)) == 42


@pytest.mark.parametrize("number", [*KEYBOARD_AND_CLUSTER, signal.SIGUSR1])
def test_outside_of_the_fit_nothing_is_to_be_saved_and_the_process_stops_at_once(number):
    assert in_child(listen_and_send(number, fitting=False)) == 50 + (number == signal.SIGUSR1)


def test_what_nohup_ignores_stays_ignored_and_data_workers_hear_nothing():
    def act():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        callback = Preemption(requeue=True)
        callback.install()
        os.kill(os.getpid(), signal.SIGHUP)
        worker = in_child(lambda: os.kill(os.getpid(), signal.SIGINT))
        os._exit(40 + callback.received + worker)

    assert in_child(act) == 40


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGUSR1)
    callback = Preemption(requeue=True)
    callback.install()
    assert signal.getsignal(signal.SIGUSR1) == callback._on_signal
    callback.uninstall()
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that notes what it was asked, and fails on request."""
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        '[ -z "$FAIL" ] || { echo "slurm_requeue error: disabled" >&2; exit 1; }\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "asked"


def test_a_job_is_requeued_once_and_an_array_s_job_by_its_own_number(scontrol, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert requeue_slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert requeue_slurm_job() == "job 17 requeued"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue_slurm_job() == "job 15_2 requeued"
    assert scontrol.read_text().splitlines() == ["requeue 17", "requeue 15_2"]
    monkeypatch.setenv("FAIL", "1")
    assert requeue_slurm_job() == "job 15_2 not requeued: slurm_requeue error: disabled"


def test_what_is_no_job_number_is_not_passed_on(scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17; rm")
    assert "not requeued" in requeue_slurm_job()
    assert not scontrol.exists()
