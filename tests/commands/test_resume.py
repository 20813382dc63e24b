"""A run that was cut off goes on where it stood and ends with the weights of one that was not."""

import pytest
import torch

from msn.training.checkpointing import PeriodicCheckpoint
from msn.training.metrics import read_metrics
from msn.weights import read_weights
from tests.commands.conftest import TINY

ARGUMENTS = [
    *TINY,
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_epochs=1",
]


def test_a_resumed_run_ends_bit_equal_to_an_undisturbed_one(command, tmp_path, monkeypatch):
    code, _, _ = command("train", *ARGUMENTS, f"run.dir={tmp_path / 'straight'}")
    assert code == 0
    cut = [*ARGUMENTS, f"run.root={tmp_path}", "run.name=cut"]
    save = PeriodicCheckpoint.on_train_epoch_end

    def save_and_fail(self, trainer, pl_module):
        save(self, trainer, pl_module)
        if trainer.current_epoch == 1:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(PeriodicCheckpoint, "on_train_epoch_end", save_and_fail)
        with pytest.raises(RuntimeError, match="power cut"):
            command("train", *cut)
    directory = tmp_path / "digits" / "cut"
    assert not (directory / "backbone.safetensors").exists()
    code, out, _ = command("train", *cut)
    assert code == 0
    assert "resuming from" in out
    straight, resumed = (
        read_weights(path / "backbone.safetensors").trunk
        for path in (tmp_path / "straight", directory)
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    rows = [read_metrics(path / "metrics.csv") for path in (tmp_path / "straight", directory)]
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]]
    assert [row["train/loss"] for row in rows[1]] == [row["train/loss"] for row in rows[0]]


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
