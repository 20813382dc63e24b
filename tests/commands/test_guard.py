"""Steps with numbers that are not finite: skipped, logged, and in the end reproduced."""

import math
import re

import pytest
import torch
from lightning.pytorch import Callback

from msn.commands import train
from msn.training.checkpointing import newest_checkpoint
from tests.commands.conftest import TINY

ARGUMENTS = [*TINY, "trainer.limit_train_batches=8", "trainer.log_every_n_steps=1"]


class Spoil(Callback):
    """Puts not-a-number into one image of a batch and notes the state after each step."""

    def __init__(self, batches):
        self.batches, self.states = batches, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in self.batches:
            batch.rand[0, 3] = math.nan

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        optimizer = trainer.optimizers[0].state_dict()["state"]
        moments = {f"{i}.{k}": v for i, s in optimizer.items() for k, v in s.items()}
        tensors = {**pl_module.state_dict(), **moments}
        self.states.append({name: value.clone() for name, value in tensors.items()})


@pytest.fixture
def spoilt(command, monkeypatch):
    def go(batches, *arguments):
        monkeypatch.setattr(
            train, "finish", lambda settings, directory, *_: directory.write_status("finished")
        )
        spoil, attach = Spoil(batches), train._attach

        def attach_too(config, trainer, *rest):
            attach(config, trainer, *rest)
            trainer.callbacks.insert(0, spoil)

        with monkeypatch.context() as patch:
            patch.setattr(train, "_attach", attach_too)
            return spoil, *command("train", *ARGUMENTS, *arguments)

    return go


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_is_taken(spoilt, tmp_path, caplog):
    spoil, code, _, err = spoilt([3, 4], f"run.dir={tmp_path / 'run'}")
    assert code == 0, err
    states = spoil.states
    assert same(states[2], states[3])
    assert same(states[2], states[4])
    assert not any(same(states[i], states[i + 1]) for i in (0, 1, 4, 5, 6))
    assert all(value.isfinite().all() for value in states[-1].values())
    warnings = [record.message for record in caplog.records if "skipped" in record.message]
    assert [message.split(":")[0] for message in warnings] == ["step 4 skipped", "step 5 skipped"]
    assert re.search(r"process 0 \(here loss nan.*epoch 0, batch 3, here images \d+, ", warnings[0])
    checkpoint = torch.load(newest_checkpoint(tmp_path / "run" / "checkpoints"), weights_only=True)
    assert checkpoint["global_step"] == 8
    assert not (tmp_path / "run" / "dumps").exists()


def test_several_in_a_row_stop_the_run_with_a_dump_that_replay_reproduces(
    spoilt, command, tmp_path
):
    """A learning rate that ruins the weights in its first step."""
    ruin = ["method.start_lr=1e30", "method.lr=1e30", "method.final_lr=1e30"]
    where = f"run.dir={tmp_path / 'run'}"
    spoil, code, _, err = spoilt([], *ruin, "callbacks.guard.max_skipped=3", where)
    assert code == 2
    dump = tmp_path / "run" / "dumps" / "step-4" / "rank-0.pt"
    assert "3 steps in a row were not finite, the last one step 4; weights are those" in err
    assert f"python -m msn replay dump={dump}" in err
    assert same(spoil.states[0], spoil.states[3])
    code, out, err = command("replay", f"dump={dump}")
    assert code == 0, err
    assert "step 4: epoch 0, batch 3" in out
    assert "first module with an output that is not finite: " in out
    assert out.strip().endswith("reproduced")
    content = torch.load(dump, weights_only=True)
    content["network"] = {
        name: torch.randn_like(value) * 0.02 if value.is_floating_point() else value
        for name, value in content["network"].items()
    }
    torch.save(content, dump)
    code, out, _ = command("replay", f"dump={dump}")
    assert code == 1
    assert "not reproduced" in out


def test_what_is_no_dump_is_refused(command, tmp_path):
    torch.save({"format": "x"}, tmp_path / "rank-0.pt")
    for name, message in {"rank-0.pt": "is not a dump", "rank-1.pt": "no such dump"}.items():
        code, _, err = command("replay", f"dump={tmp_path / name}")
        assert code == 2
        assert message in err
