"""A checkpoint file is whole or it is known not to be, whatever the disk did."""

import errno
import os
import resource
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from msn import files
from msn.errors import UserError
from msn.files import (
    damage,
    placed_at,
    remove_stale,
    write_atomically,
    write_bytes,
    write_checkpoint,
)

CONTENT = {"weights": torch.arange(100_000.0), "numbers": [1, (2, "three")], "none": None}


@contextmanager
def largest_file(size):
    """The system itself refuses to write further, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_written_is_read_and_holds_its_checksum(tmp_path):
    path = tmp_path / "a" / "b" / "x.ckpt"
    write_checkpoint(path, CONTENT)
    content = torch.load(path, weights_only=True)
    assert torch.equal(content.pop("weights"), CONTENT["weights"])
    assert content == {"numbers": [1, (2, "three")], "none": None}
    assert damage(path) is None


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 0.9985, 0.9999, 1.0])
def test_one_flipped_bit_is_seen_wherever_it_is(tmp_path, where):
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, CONTENT)
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 4
    path.write_bytes(content)
    assert damage(path) is not None


@pytest.mark.parametrize("size", [0, 10, 1000, 200_000, -60, -1])
def test_a_file_that_ends_early_is_seen(tmp_path, size):
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, CONTENT)
    path.write_bytes(path.read_bytes()[:size])
    assert damage(path) is not None


def test_files_without_a_checksum_are_trusted_if_they_are_whole(tmp_path):
    torch.save(CONTENT, tmp_path / "x.ckpt")
    assert damage(tmp_path / "x.ckpt") is None
    torch.save({"code": os.path.join}, tmp_path / "y.ckpt")
    assert damage(tmp_path / "y.ckpt") is not None
    assert damage(tmp_path / "missing.ckpt") == "No such file or directory"


@pytest.mark.parametrize("size", [100, 50_000, 400_000, 401_000])
def test_an_error_of_the_system_is_raised_and_the_old_file_stays(tmp_path, size):
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"old": 1})
    with largest_file(size), pytest.raises(OSError, match="File too large") as caught:
        write_checkpoint(path, CONTENT)
    assert caught.value.errno == errno.EFBIG
    assert torch.load(path, weights_only=True) == {"old": 1}
    assert damage(path) is None
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_space_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=300_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(files, "write_atomically", lambda *a: pytest.fail("began to write"))
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(tmp_path / "x.ckpt", CONTENT)


def test_the_file_is_synced_before_it_takes_its_place(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, files.Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or sync(fd))
    monkeypatch.setattr(
        files.Path, "replace", lambda a, b: events.append("replace") or replace(a, b)
    )
    write_atomically(tmp_path / "x", lambda file: file.write(b"new"))
    assert events == ["sync", "replace", "sync"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".epoch-1-step-1.ckpt.abc.tmp").touch()
    (tmp_path / "mine.tmp").touch()
    remove_stale(tmp_path)
    assert os.listdir(tmp_path) == ["mine.tmp"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_system_names_the_file_and_not_the_temporary_one(
    tmp_path, monkeypatch, call
):
    path = tmp_path / "run.json"
    if call == "replace":
        path.mkdir()
    else:
        monkeypatch.setattr(
            os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x")
        )
    with pytest.raises(OSError, match=f"{path}") as caught:
        write_atomically(path, lambda file: file.write(b"{}"))
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path] * (call == "replace")


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "below", b"")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_written_files_and_directories_follow_the_umask(tmp_path, mask, mode):
    old = os.umask(mask)
    try:
        write_bytes(tmp_path / "file", b"")
        write_checkpoint(tmp_path / "x.ckpt", {"a": 1})
        with placed_at(tmp_path / "directory") as place:
            write_bytes(place / "file", b"")
    finally:
        os.umask(old)
    for name in ("file", "x.ckpt", "directory/file"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name
    assert (tmp_path / "directory").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_pipe_is_no_checkpoint_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.ckpt")
    assert damage(tmp_path / "x.ckpt") == "not a regular file"
