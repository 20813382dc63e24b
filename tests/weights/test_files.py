import errno
import os

import pytest
import torch

from msn.errors import UserError
from msn.weights.files import open_weights, save_tensors, write_bytes


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Runs()}, "file.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="refused") as error:
        open_weights(tmp_path / "file.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.safetensors", "a.pth.tar"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_cut_off_file_is_one_clear_line(tmp_path, name, share):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_tensors(path, {"a": torch.zeros(1000)}, {})
    else:
        torch.save({"a": torch.zeros(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="damaged") as error:
        open_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"hello, no pickle", bytes(range(256)) * 20, b"\x80\x04"])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_of_another_kind_is_one_clear_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_weights(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            open_weights(path)


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


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "below", b"")


def test_written_files_have_the_permissions_of_the_user(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
