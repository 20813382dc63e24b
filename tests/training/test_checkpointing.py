"""Files that are whole after a crash, and which of them are kept."""

import os

import pytest
import torch

from msn.training import checkpointing
from msn.training.checkpointing import (
    DurableCheckpointIO,
    PeriodicCheckpoint,
    checkpoints,
    newest_checkpoint,
    write_durably,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.ckpt"
    write_durably(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_durably(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_the_file_is_synced_before_it_takes_its_place(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, checkpointing.Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or sync(fd))
    monkeypatch.setattr(
        checkpointing.Path, "replace", lambda a, b: events.append("replace") or replace(a, b)
    )
    write_durably(tmp_path / "x", lambda file: file.write(b"new"))
    assert events == ["sync", "replace", "sync"]


def test_only_plain_data_is_read(tmp_path):
    torch.save({"x": os.path.join}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="[Ww]eights"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


def test_the_newest_files_and_every_nth_are_kept(tmp_path):
    for epoch in range(1, 8):
        (tmp_path / f"epoch-{epoch}-step-{10 * epoch}.ckpt").touch()
    (tmp_path / "notes.txt").touch()
    callback = PeriodicCheckpoint(
        directory=tmp_path,
        every_n_epochs=1,
        every_n_steps=None,
        keep_last=2,
        keep_every_n_epochs=3,
        max_failures=3,
    )
    callback._remove_old()
    kept = [path.name.split("-step")[0] for path in checkpoints(tmp_path)]
    assert kept == ["epoch-3", "epoch-5", "epoch-6", "epoch-7"]
    assert newest_checkpoint(tmp_path).name == "epoch-7-step-70.ckpt"
    assert (tmp_path / "notes.txt").exists()


def test_epochs_are_ordered_as_numbers(tmp_path):
    for epoch in (9, 10):
        (tmp_path / f"epoch-{epoch}-step-{epoch}.ckpt").touch()
    assert newest_checkpoint(tmp_path).name == "epoch-10-step-10.ckpt"
