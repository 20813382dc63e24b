"""Runs with method=mae: stopped and resumed, accumulated, spoilt, on two processes, begun again."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback

from benchmarks.kill_resume import CLOCKS, differing
from msn.commands import train
from msn.training.checkpointing import newest_checkpoint
from msn.training.preemption import EXIT_CODE
from msn.weights import read_weights
from tests.commands.test_processes import PROGRAM, end, start, torchrun

SMALL = [
    "experiment=mae_digits",
    "model.embed_dim=24",
    "model.depth=2",
    "method.decoder.embed_dim=16",
    "method.decoder.num_heads=2",
    "method.warmup_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=4",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_epochs=1",
    "callbacks.probe.references=100",
    "callbacks.probe.held_out=50",
    "protocol.splits=2",
    "protocol.shots=[1]",
    "protocol.knn_neighbours=null",
    "protocol.logistic.lambd_grid=null",
]


class After(Callback):
    def __init__(self, batches, act):
        self.batches, self.act = batches, act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch * 4 + batch_idx + 1 == self.batches:
            self.act()


@pytest.fixture
def run(command, monkeypatch):
    """Run train.py without the table at its end, with an act after so many batches."""

    def go(*arguments, batches=None, act=None):
        attach = train._attach

        def attach_too(config, trainer, *rest):
            attach(config, trainer, *rest)
            trainer.callbacks.insert(0, After(batches, act))

        with monkeypatch.context() as patch:
            patch.setattr(train, "_attach", attach_too)
            patch.setattr(train, "finish", lambda _, directory, *__: directory.write_status("done"))
            return command("train", *SMALL, "report=false", *arguments)

    return go


def state(directory):
    return torch.load(newest_checkpoint(directory / "checkpoints"), weights_only=True)


@pytest.mark.parametrize(("accumulated", "step"), [(1, 6), (2, 3)])
def test_a_run_stopped_in_an_epoch_s_middle_ends_bit_equal(run, tmp_path, accumulated, step):
    several = f"trainer.accumulate_grad_batches={accumulated}"
    code, _, err = run(several, f"run.dir={tmp_path / 'straight'}")
    assert code == 0, err
    cut = [several, f"run.dir={tmp_path / 'cut'}"]
    # Where two batches make a step, the signal comes after the first one and waits for the second.
    signalled = 6 if accumulated == 1 else 5
    code, _, _ = run(*cut, batches=signalled, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert code == EXIT_CODE
    found = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert found.name == f"epoch-1-step-{step}.ckpt"
    code, out, err = run(*cut)
    assert code == 0, err
    assert "resuming from" in out
    straight, resumed = state(tmp_path / "straight"), state(tmp_path / "cut")
    assert straight["global_step"] == 12 // accumulated
    assert set(differing(straight, resumed)) <= CLOCKS


def test_steps_that_are_not_finite_are_dumped_and_replayed(run, command, tmp_path):
    ruin = ["method.start_lr=1e30", "method.lr=1e30", "callbacks.guard.max_skipped=2"]
    several = "trainer.accumulate_grad_batches=2"
    code, _, err = run(*ruin, several, f"run.dir={tmp_path / 'run'}")
    assert code == 2
    assert "2 steps in a row were not finite" in err
    (dump,) = (tmp_path / "run" / "dumps").rglob("rank-0.pt")
    content = torch.load(dump, weights_only=True)
    assert len(content["images"]) == len(content["noise"]) == 2 * 64
    code, out, err = command("replay", f"dump={dump}")
    assert code == 0, err
    assert out.strip().endswith("reproduced")


def test_a_whole_run_gives_backbone_table_and_report_and_the_other_method_begins_with_it(
    command, run, tmp_path
):
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "method.warmup_epochs=0"]
    code, out, err = command("train", *SMALL, *short, f"run.dir={tmp_path / 'mae'}")
    assert code == 0, err
    assert "1 view of 32 px" in out
    assert "no report" not in out + err
    assert (tmp_path / "mae" / "report.html").is_file()
    trained = state(tmp_path / "mae")["state_dict"]
    trunk = read_weights(tmp_path / "mae" / "backbone.safetensors").trunk
    for name, value in trunk.items():
        assert torch.equal(value, trained[f"network.trunk.{name}"])
    checkpoint = newest_checkpoint(tmp_path / "mae" / "checkpoints")
    code, out, err = run(*short, f"init={checkpoint}", f"run.dir={tmp_path / 'again'}")
    assert code == 0, err
    assert "decoder loaded" in " ".join(out.split())
    msn = ["model.embed_dim=24", "model.depth=2", "method.num_prototypes=16", "report=false"]
    msn += ["trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    msn += [argument for argument in SMALL if argument.startswith("protocol.")]
    code, out, err = command("train", *msn, f"init={checkpoint}", f"run.dir={tmp_path / 'msn'}")
    assert code == 0, err
    told = " ".join(out.split())
    assert "positions the file's, and trained from here on" in told
    assert "decoder ignored" in told
    begun = newest_checkpoint(tmp_path / "msn" / "checkpoints")
    code, out, err = run(*short, f"init={begun}", f"run.dir={tmp_path / 'back'}")
    assert code == 0, err
    told = " ".join(out.split())
    assert "positions the file's, and not trained from here on" in told
    assert "decoder initialised (the file has none)" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    # Lightning's FSDP2 does not take float64.
    ("strategy", "precision", "bound"),
    [("ddp", "64-true", 1e-6), ("fsdp2", "32-true", 1e-4)],
)
def test_two_processes_give_what_one_gives(tmp_path, strategy, precision, bound):
    """Also stopped on two and resumed on two."""
    precise = [*SMALL, f"trainer.precision={precision}", "report=false"]
    code, out = end(start(PROGRAM, *precise, f"run.dir={tmp_path / 'one'}"))
    assert code == 0, out
    two = [*precise, f"trainer.strategy={strategy}", f"run.dir={tmp_path / 'two'}"]
    _, out = torchrun(PROGRAM, *two, DISTURB="1:5:SIGTERM")
    assert out.count("interrupted: saved") == 1, out
    code, out = torchrun(PROGRAM, *two)
    assert code == 0, out
    assert "resuming from" in out
    one, both = (state(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert one.keys() == both.keys()
    # Views are made in single precision, from batches of other sizes.
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=10 * bound, atol=bound, msg=name)
