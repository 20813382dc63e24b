import os

import pytest
import torch

from msn.errors import UserError
from msn.weights.files import open_weights, save_tensors


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
