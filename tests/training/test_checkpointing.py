"""When files are written, which of them are kept, and what a disk that fails does to a run."""

import os
import threading

import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from msn.commands.entry import compose, to_plain
from msn.commands.verify import load_golden, step_views
from msn.data.views import Views
from msn.errors import UserError
from msn.files import damage, write_checkpoint
from msn.training import checkpointing
from msn.training.checkpointing import (
    DurableCheckpointIO,
    PeriodicCheckpoint,
    check_same_run,
    checkpoints,
    identity_of,
    newest_checkpoint,
)
from tests.conftest import GOLDEN
from tests.training.test_module import module_of, trainer_of


def saver(directory, **changes):
    settings = {
        "every_n_epochs": 1,
        "every_n_steps": None,
        "keep_last": 2,
        "keep_every_n_epochs": None,
        "max_failures": 2,
    }
    return PeriodicCheckpoint(directory=directory, **{**settings, **changes})


def train(tmp_path, *callbacks, epochs=4, steps=1):
    """A small run on one batch."""
    golden = load_golden(GOLDEN["default"])
    module = module_of(golden.config, warmup_epochs=0)
    module.plan_schedule(epochs=epochs, steps_per_epoch=steps)
    batch = Views(*(view.float() for view in step_views(golden.config, golden.tensors, 0)))
    trainer = trainer_of(tmp_path, callbacks=[*callbacks], precision="32-true", max_epochs=epochs)
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    return trainer


def names(directory):
    return [path.name for path in checkpoints(directory)]


class BeforeEpoch(Callback):
    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.strategy.checkpoint_io.wait()
            self.act()


def test_only_plain_data_is_read(tmp_path):
    torch.save({"x": os.path.join}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="[Ww]eights"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


def test_the_newest_files_and_every_nth_epoch_s_are_kept(tmp_path):
    steps = [(0, 5), (1, 10), (2, 20), (3, 30), (3, 35), (4, 40), (5, 50), (6, 60), (6, 65)]
    for epoch, step in [*steps, (9, 90)]:
        (tmp_path / f"epoch-{epoch}-step-{step}.ckpt").touch()
    (tmp_path / "notes.txt").touch()
    callback = saver(tmp_path, keep_last=1, keep_every_n_epochs=3)
    callback._steps_per_epoch = 10
    callback._remove_old(tmp_path / "epoch-6-step-65.ckpt")
    kept = [name.removesuffix(".ckpt") for name in names(tmp_path)]
    # The last one is a leftover, newer than what was written, and must not displace that.
    assert kept == ["epoch-3-step-30", "epoch-6-step-60", "epoch-6-step-65", "epoch-9-step-90"]
    assert (tmp_path / "notes.txt").exists()


def test_epochs_are_ordered_as_numbers(tmp_path):
    for epoch in (9, 10):
        (tmp_path / f"epoch-{epoch}-step-{epoch}.ckpt").touch()
    assert newest_checkpoint(tmp_path).name == "epoch-10-step-10.ckpt"


def test_files_come_by_epochs_and_by_steps_and_nothing_else_is_written(tmp_path):
    train(tmp_path, saver(tmp_path, every_n_epochs=2, every_n_steps=2, keep_last=9), steps=3)
    steps = [int(name.split("-")[3].removesuffix(".ckpt")) for name in names(tmp_path)]
    assert {12} <= set(steps) <= {2, 4, 6, 8, 10, 12}
    assert sorted(os.listdir(tmp_path)) == sorted(names(tmp_path))
    assert all(damage(path) is None for path in checkpoints(tmp_path))


def test_a_step_waits_for_the_copy_alone_and_what_is_written_is_that_copy(
    tmp_path, monkeypatch, caplog
):
    """The first write lasts until the last epoch; steps and saves between go on without it."""
    last, content = threading.Event(), {}

    def write(path, checkpoint):
        if path.name.startswith("epoch-1-"):
            assert last.wait(60)
        content[path.name] = checkpoint["state_dict"]["network.prototypes"].clone()
        write_checkpoint(path, checkpoint)

    monkeypatch.setattr(checkpointing, "write_checkpoint", write)
    seen = {}

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen[trainer.current_epoch + 1] = pl_module.network.prototypes.detach().clone()
            if trainer.current_epoch == 3:
                last.set()

    trainer = train(tmp_path, Watch(), saver(tmp_path))
    assert "no epoch-2-step-2.ckpt: the file before it is still being written" in caplog.text
    assert names(tmp_path) == ["epoch-1-step-1.ckpt", "epoch-4-step-4.ckpt"]
    assert torch.equal(content["epoch-1-step-1.ckpt"], seen[1])
    assert not torch.equal(seen[1], seen[4])
    assert trainer.global_step == 4


def test_a_disk_that_is_full_for_a_while_costs_that_file_and_no_other(tmp_path, caplog):
    where = tmp_path / "disk"

    def fill():
        where.rename(tmp_path / "away")
        where.write_text("no directory")

    def clear():
        where.unlink()
        (tmp_path / "away").rename(where)

    train(tmp_path, BeforeEpoch(1, fill), BeforeEpoch(2, clear), saver(where, keep_last=9))
    assert [name.split("-")[1] for name in names(where)] == ["1", "3", "4"]
    assert "epoch-2-step-2.ckpt could not be written: File exists; training goes on" in caplog.text


def test_a_disk_that_stays_full_ends_the_run_in_one_line_and_keeps_the_last_file(
    tmp_path, monkeypatch
):
    def full(path, checkpoint):
        if not path.name.startswith("epoch-1-"):
            raise OSError(28, "No space left on device")
        write_checkpoint(path, checkpoint)

    monkeypatch.setattr(checkpointing, "write_checkpoint", full)
    wait = [BeforeEpoch(epoch, lambda: None) for epoch in range(9)]
    with pytest.raises(UserError, match="epoch-3.*could not be written: No space left") as stop:
        train(tmp_path, *wait, saver(tmp_path), epochs=9)
    assert "\n" not in str(stop.value)
    assert names(tmp_path) == ["epoch-1-step-1.ckpt"]
    assert damage(newest_checkpoint(tmp_path)) is None


def test_an_error_that_is_none_of_the_disk_s_is_not_lost_with_its_thread(tmp_path, monkeypatch):
    def fail(path, checkpoint):
        raise RuntimeError("a defect")

    monkeypatch.setattr(checkpointing, "write_checkpoint", fail)
    with pytest.raises(UserError, match="a defect"):
        train(tmp_path, saver(tmp_path), epochs=1)


def test_numbers_out_of_range_are_refused(tmp_path):
    for name in ("every_n_epochs", "every_n_steps", "keep_last", "max_failures"):
        with pytest.raises(UserError, match=f"callbacks.checkpoint.{name}=0: must be >= 1"):
            saver(tmp_path, **{name: 0})


@pytest.fixture(scope="module")
def identity():
    config = compose("train", [])

    def of(*changes):
        changed = OmegaConf.merge(config, OmegaConf.from_dotlist(list(changes)))
        return identity_of(to_plain(changed))

    return of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, identity):
    path = tmp_path_factory.mktemp("run") / "epoch-1-step-3.ckpt"
    torch.save({"msn": {"identity": identity()}, "state_dict": {"w": torch.zeros(2, 3)}}, path)
    return path


WEIGHTS = {"w": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", "seed was 0 and is 1"),
        ("method.lr=0.1", "method.lr was 0.003 and is 0.1"),
        ("method.head.hidden_dim=8", "method.head.hidden_dim was 512 and is 8"),
        ("model.depth=3", "model.depth was 4 and is 3"),
        ("data.split_seed=1", "data.split_seed was 0 and is 1"),
        ("data.views.hue=0.1", "data.views.hue was 0.0 and is 0.1"),
        ("data.global_batch_size=32", "data.global_batch_size was 64 and is 32"),
        ("trainer.max_epochs=4", "trainer.max_epochs was 75 and is 4"),
    ],
)
def test_what_changes_numbers_is_refused_and_named(checkpoint, identity, change, message):
    with pytest.raises(UserError, match="resume.force=true") as refusal:
        check_same_run(checkpoint, identity(change), WEIGHTS, force=False)
    assert message in str(refusal.value)
    check_same_run(checkpoint, identity(change), WEIGHTS, force=True)


def test_what_changes_no_numbers_is_not(checkpoint, identity):
    free = ["data.num_workers=3", "trainer.devices=2", "chunk_size=8", "data.prefetch_batches=4"]
    check_same_run(checkpoint, identity(*free), WEIGHTS, force=False)
    assert identity("method.warmup_epochs=null") == identity("method.warmup_epochs=3.75")


@pytest.mark.parametrize("weights", [{"w": torch.ones(2, 4)}, {}, {**WEIGHTS, "v": torch.ones(1)}])
def test_weights_that_do_not_fit_are_refused_though_forced(checkpoint, identity, weights):
    with pytest.raises(UserError, match="with another model.depth its weights do not fit"):
        check_same_run(checkpoint, identity("model.depth=3"), weights, force=True)
