"""Files that are no weights, were made to harm, or damaged at random (a thousand of them)."""

import json
import os
import pickle
import random
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from msn.errors import UserError
from msn.files import write_checkpoint
from msn.weights import read_weights
from msn.weights import tensors as tensors_module
from msn.weights.huggingface import model_config, preprocessor_config, to_huggingface
from msn.weights.tensors import open_weights, save_tensors
from tests.weights.builders import (
    MODEL,
    make_network,
    make_trunk,
    released_layout,
    save_checkpoint,
    save_run,
)
from tests.weights.conftest import assert_same

FLOATS = b"ctorch\nFloatStorage\n"


def rezipped(path, change, compression=zipfile.ZIP_STORED):
    """The same archive with other members, whose sizes and CRCs are right."""
    with zipfile.ZipFile(path) as archive:
        members = [(m.filename, archive.read(m)) for m in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, change(name, data))
    return path


def with_pickle(path, pickled, storage=b"\0" * 64):
    """An archive whose content is this pickle, and one storage of 16 floats."""
    torch.save({"a": torch.zeros(16)}, path)
    new = {"data.pkl": pickled, "0": storage}
    return rezipped(path, lambda name, data: new.get(name.rpartition("/")[2], data))


def tensor(size, stride, count=16):
    """A pickle of one tensor of this shape in a storage that says to hold `count` floats."""
    number, *shape = [pickle.dumps(part, 2)[2:-1] for part in (count, tuple(size), tuple(stride))]
    return (
        b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage"
        + FLOATS
        + b"X\x01\0\0\x000X\x03\0\0\0cpu"
        + number
        + b"tQK\0"
        + b"".join(shape)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def test_the_crafted_tensor_is_read_where_it_is_honest(tmp_path):
    content, _ = open_weights(with_pickle(tmp_path / "a.pth", tensor((4, 4), (4, 1))))
    assert content["a"].shape == (4, 4)


HEX = b"c_codecs\nencode\n"
CRAFTED = {
    "stride 0": (tensor((1 << 20, 1 << 20), (0, 0)), "repeats the 16 numbers"),
    "many axes": (tensor((1,) * 70, (1,) * 70), "a tensor of shape"),
    "storage beyond the file": (tensor((4,), (1,), 1 << 40), "more bytes than the file has"),
    "negative storage": (tensor((4,), (1,), -4), "more bytes than the file has"),
    "memo of 16 GB": (b"\x80\x02}r\xff\xff\xff\x7f.", "refused"),
    "text beyond the file": (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged"),
    "codecs that swell": (
        b"\x80\x02" + HEX * 30 + b"X\x04\0\0\0abcd" + b"X\x03\0\0\0hex\x86R" * 30 + b".",
        "_codecs.encode",
    ),
    "bytes of any number": (
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.",
        "would run builtins.bytearray",
    ),
    "system": (b"cposix\nsystem\n(X\x05\0\0\0touchtR.", "would run posix.system"),
    "eval": (b"c__builtin__\neval\n(X\x03\0\0\x001+1tR.", "would run builtins.eval"),
    "attribute": (b"\x80\x02ctorch\nload\n.", "would run torch.load"),
    "shadowed": (b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb.", "refused"),
    "deep": (b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", "must hold a dictionary"),
    "nothing": (b"", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "long number": (b"I" + b"9" * 10_000 + b"\n.", "damaged"),
}


@pytest.mark.parametrize("name", CRAFTED)
@pytest.mark.parametrize("legacy", [False, True])
def test_crafted_pickles_are_one_line_and_cheap(tmp_path, name, legacy):
    path, (pickled, said) = tmp_path / "a.pth", CRAFTED[name]
    if legacy:
        parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
        path.write_bytes(b"".join(parts) + pickled + pickle.dumps([], 2) * (name == "deep"))
    else:
        with_pickle(path, pickled)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        read_weights(path, num_heads=1)
    assert time.monotonic() - start < 5
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_compressed_members_are_refused_before_they_are_read(tmp_path):
    torch.save({"a": torch.zeros(1 << 22)}, tmp_path / "a.pth")
    rezipped(tmp_path / "a.pth", lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pth").stat().st_size < 1 << 16
    with pytest.raises(UserError, match="its members are compressed"):
        open_weights(tmp_path / "a.pth")


def test_members_that_share_their_bytes_are_refused(tmp_path):
    torch.save({"a": torch.zeros(10_000)}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
        (member,) = (m for m in archive.infolist() if m.filename.endswith("data/0"))
        for number in range(1, 50):
            twin = zipfile.ZipInfo(member.filename[:-1] + str(number))
            twin.file_size = twin.compress_size = member.file_size
            twin.header_offset, twin.CRC = member.header_offset, member.CRC
            archive.filelist.append(twin)
        archive._didModify = True
    assert len(data) < (tmp_path / "a.pth").stat().st_size < 2 * len(data)
    with pytest.raises(UserError, match="claim more bytes than the file has"):
        open_weights(tmp_path / "a.pth")


def test_files_without_checksums_of_members_are_read(tmp_path):
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(computed)
    assert open_weights(tmp_path / "a.pth")[0]["a"].tolist() == [1, 1, 1]


def write_all(root):
    """Files of every kind, and whether a checksum covers them."""
    trunk, network = make_trunk(), make_network()
    states = trunk.state_dict()
    save_run(root / "run", trunk)
    write_checkpoint(root / "a.ckpt", torch.load(save_checkpoint(root / "b", network)))
    torch.save({"model": states, "epoch": 3}, root / "plain.pth")
    torch.save({"model": states}, root / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(released_layout("default"), root / "a.pth.tar")
    save_file(states, root / "plain.safetensors")
    (root / "hf").mkdir()
    save_file(to_huggingface(states), root / "hf" / "model.safetensors")
    (root / "hf" / "config.json").write_text(json.dumps(model_config(MODEL, None)))
    content = preprocessor_config(32, mean=[0.5] * 3, std=[0.5] * 3)
    (root / "hf" / "preprocessor_config.json").write_text(json.dumps(content))
    return {
        "run/backbone.safetensors": True,
        "a.ckpt": True,
        "plain.pth": True,
        "a.pth.tar": True,
        "legacy.pth": False,
        "plain.safetensors": False,
        "hf/model.safetensors": False,
        "hf/config.json": False,
        "hf/preprocessor_config.json": False,
    }


def damaged(data, draw):
    """One of the ways in which bytes change."""
    data = bytearray(data)
    place = (
        draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(4000, len(data)))
    )
    length = draw.choice((1, 1, 2, 8, 64, 1000))
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.choice((1, 1, 1, 5, 50))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[place] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del data[place:]
    elif kind == 3:
        del data[place : place + length]
    elif kind == 4:
        data[place:place] = data[:length] if draw.random() < 0.5 else draw.randbytes(length)
    else:
        data[place : place + length] = draw.choice((bytes(length), b"\xff" * length))
    return bytes(data)


def damaged_inside(path, draw):
    """Damage that the container's own lengths and CRCs do not show."""
    if path.name == "plain.safetensors" or path.parent.name == "hf":
        data = path.read_bytes()
        if path.suffix == ".json":
            return None
        (length,) = struct.unpack("<Q", data[:8])
        header = damaged(data[8 : 8 + length], draw)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    elif path.name in ("plain.pth", "a.pth.tar"):
        rezipped(path, lambda name, data: damaged(data, draw) if name.endswith(".pkl") else data)
    else:
        return None
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_thousand_damaged_files_are_one_line_or_what_they_were(tmp_path):
    draw = random.Random(0)
    kinds = write_all(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in kinds}
    targets = {name: _place(tmp_path / name) for name in kinds}
    expected = {name: read_weights(place, num_heads=2) for name, place in targets.items()}
    refused, start = 0, time.monotonic()
    for turn in range(1350):
        name = list(kinds)[turn % len(kinds)]
        path = tmp_path / name
        sealed = kinds[name]
        if turn % 3 == 0 and damaged_inside(path, draw) is not None:
            sealed = False
        else:
            path.write_bytes(damaged(whole[name], draw))
        began = time.monotonic()
        found = refusal = None
        try:
            found = read_weights(targets[name], num_heads=2)
        except UserError as error:
            refusal = str(error)
        if found is None:
            refused += 1
            assert "\n" not in str(refusal), (turn, name)
        else:
            assert all(bool(t.isfinite().all()) for t in found.trunk.values()), (turn, name)
            if sealed:
                assert_same(found.trunk, expected[name].trunk)
                assert found.model == expected[name].model, (turn, name)
        assert time.monotonic() - began < 10, (turn, name)
        path.write_bytes(whole[name])
    assert refused > 600
    assert time.monotonic() - start < 120


def _place(path):
    return path.parent if path.parent.name in ("run", "hf") else path


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


@pytest.mark.parametrize("kind", ["safetensors", "pth", "shared", "legacy", "names"])
def test_more_tensors_or_names_than_a_network_has_are_refused_by_counting(
    tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(tensors_module, "MAX_TENSORS", 200)
    monkeypatch.setattr(tensors_module, "_MAX_OPCODES", 20_000)
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    one = torch.ones(1)
    many = {f"blocks.{i}": one[:] if kind == "shared" else torch.ones(1) for i in range(201)}
    few = {name: many[name] for name in list(many)[:190]}

    def save(content):
        if kind == "safetensors":
            save_file(content, path)
        else:
            torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")

    if kind != "shared":  # of which the file holds one
        save(few)
        open_weights(path)
    save({"names": {i: str(i) for i in range(20_000)}} if kind == "names" else many)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("began to read"))
    what = "20,000 names and numbers" if kind == "names" else "200 tensors"
    with pytest.raises(UserError, match=f"refused: holds more than {what}"):
        open_weights(path)
