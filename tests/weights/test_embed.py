import csv
import json
import os
import shutil

import numpy as np
import pandas
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_sample_images

import msn
from msn.__main__ import run_named
from msn.commands import embed
from msn.commands.entry import compose
from msn.errors import UserError
from msn.weights import load_backbone
from tests.weights.builders import make_trunk, save_run

COUNT = 7


@pytest.fixture
def folder(tmp_path):
    """A run, and crops of a photograph in two nested folders."""
    save_run(tmp_path / "run", make_trunk())
    photo = Image.fromarray(load_sample_images().images[0])
    for index in range(COUNT):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((40 * index, 10, 40 * index + 90, 100)).save(path)
    return tmp_path


def data(root, **changes):
    shipped = OmegaConf.to_container(compose("embed", []), resolve=False)["data"]
    return {**shipped, "root": str(root), "num_workers": 0, **changes}


def run(folder, **changes):
    settings = {
        "checkpoint": str(folder / "run"),
        "data": data(folder / "images"),
        "out": str(folder / "features.safetensors"),
        "feature": "class_token",
        "batch_size": 2,
        "device": "cpu",
        "overwrite": False,
        "model": {"num_heads": None},
        "init_key": None,
        "init_family": None,
        **changes,
    }
    return embed.run(OmegaConf.create(settings))


def arguments(folder):
    """The same as a command."""
    return [
        f"checkpoint={folder / 'run'}",
        f"data.root={folder / 'images'}",
        f"out={folder / 'features.safetensors'}",
        *("data.num_workers=0", "batch_size=2", "device=cpu"),
    ]


def read(folder):
    with safe_open(folder / "features.safetensors", "pt") as file:
        return file.get_tensor("features"), json.loads(file.metadata()["ids"]), file.metadata()


@pytest.mark.parametrize("feature", ["class_token", "class_token_norm", "patch_mean"])
def test_each_row_is_the_feature_of_the_image_with_its_id(folder, feature):
    run(folder, feature=feature)
    features, ids, metadata = read(folder)
    assert ids == sorted(f"{'ab'[i % 2]}/{i}.png" for i in range(COUNT))
    assert json.loads(metadata["msn"])["feature"] == feature
    backbone = load_backbone(folder / "run")
    for row, name in zip(features, ids, strict=True):
        pixels = backbone.transform(Image.open(folder / "images" / name))[None]
        with torch.no_grad():
            before, after = (backbone.forward_features(pixels, norm=n)[0] for n in (False, True))
        expected = {
            "class_token": before[0],
            "class_token_norm": after[0],
            "patch_mean": after[1:].mean(dim=0),
        }
        torch.testing.assert_close(row, expected[feature], rtol=0, atol=1e-5)
    assert sorted(path.name for path in folder.iterdir()) == [
        "features.safetensors",
        "images",
        "run",
    ]


def test_a_stopped_job_goes_on_where_it_was(folder, monkeypatch, capsys):
    monkeypatch.setattr(embed, "PIECE", 2)
    run(folder)
    whole, ids, _ = read(folder)
    (folder / "features.safetensors").unlink()
    computed, stop_after = [], 2
    compute = embed.forward_feature

    def counted(backbone, images, feature):
        if len(computed) == stop_after:
            raise KeyboardInterrupt
        computed.append(len(images))
        return compute(backbone, images, feature)

    monkeypatch.setattr(embed, "forward_feature", counted)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert not (folder / "features.safetensors").exists()
    stop_after = 100
    run(folder)
    assert "resuming: 4 of 7 images are done" in capsys.readouterr().out
    assert sum(computed) == COUNT
    assert torch.equal(read(folder)[0], whole)
    assert read(folder)[1] == ids


@pytest.mark.parametrize("damage", [b"no piece", None])
def test_a_damaged_piece_is_made_again(folder, monkeypatch, damage, caplog):
    monkeypatch.setattr(embed, "PIECE", 2)
    run(folder)
    whole = read(folder)[0]

    def stopped(*args):
        raise KeyboardInterrupt

    join = embed._join
    monkeypatch.setattr(embed, "_join", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder, overwrite=True)
    monkeypatch.setattr(embed, "_join", join)
    piece = sorted(folder.glob(".*.part/*.safetensors"))[1]
    if damage is None:  # a whole file with other numbers
        content = bytearray(piece.read_bytes())
        content[-3] ^= 1
        damage = bytes(content)
    piece.write_bytes(damage)
    run(folder, overwrite=True)
    assert torch.equal(read(folder)[0], whole)
    assert "is damaged; recomputing" in caplog.text


def test_pieces_of_another_backbone_are_not_taken_over(folder, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(embed, "PIECE", 2)
    join = embed._join
    monkeypatch.setattr(embed, "_join", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.setattr(embed, "_join", join)
    save_run(folder / "run", make_trunk(seed=9))
    run(folder)
    found = read(folder)[0]
    for left in folder.glob(".*.part"):
        shutil.rmtree(left)
    run(folder, overwrite=True)
    assert torch.equal(found, read(folder)[0])


def test_unreadable_images_are_left_out_and_named(folder, capsys):
    (folder / "images" / "a" / "0.png").write_bytes(b"no image")
    run(folder)
    features, ids, _ = read(folder)
    assert len(features) == len(ids) == COUNT - 1
    assert "a/0.png" not in ids
    assert "left out, cannot be read: a/0.png" in capsys.readouterr().out


def test_all_unreadable_images_are_written_down_with_reasons(folder, monkeypatch, capsys):
    monkeypatch.setattr(embed, "PIECE", 2)
    monkeypatch.setattr(embed, "SHOWN", 1)
    for name in ("a/0.png", "b/3.png", "b/5.png"):
        (folder / "images" / name).write_bytes(b"no image")
    run(folder)
    with open(folder / "features.unreadable.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["a/0.png", "b/3.png", "b/5.png"]
    assert all(row["reason"] for row in rows)
    shown = capsys.readouterr().out
    assert "features.unreadable.csv" in shown
    assert "b/3.png" not in shown
    for name in ("a/0.png", "b/3.png", "b/5.png"):
        (folder / "images" / name).unlink()
    run(folder, overwrite=True)
    assert not (folder / "features.unreadable.csv").exists()


def test_names_that_are_no_text_pass_through_every_output(folder, capsysbinary):
    odd = os.fsdecode(b"caf\xe9.png")
    shutil.copy(folder / "images" / "a" / "0.png", folder / "images" / odd)
    broken = os.fsdecode(b"br\xfcche.png")
    (folder / "images" / broken).write_bytes(b"no image")
    run_named("embed", arguments(folder))
    assert odd in read(folder)[1]
    assert b"br\xfcche.png" in (folder / "features.unreadable.csv").read_bytes()
    shown = capsysbinary.readouterr().out
    assert b"left out, cannot be read: br\xfcche.png" in shown
    assert b"8 images embedded, 1 left out" in shown


def test_a_run_and_features_may_have_names_that_are_not_utf8(folder, capsysbinary):
    run(folder)
    expected, ids, _ = read(folder)
    odd = folder / os.fsdecode(b"caf\xe9.run")
    (folder / "run").rename(odd)
    out = odd / os.fsdecode(b"\xe9.safetensors")
    run_named("embed", [*arguments(folder), f"checkpoint={odd}", f"out={out}"])
    # Batches as before: sums of other batches may be rounded otherwise.
    again = {"overwrite": True, "device": "cpu", "batch_size": 2}
    found = msn.embed(odd, folder / "images", out=out, **again)
    assert torch.equal(found.features, expected)
    assert found.names == ids
    assert sorted(path.name for path in odd.iterdir()) == ["backbone.safetensors", out.name]


def test_out_of_memory_says_what_takes_less_and_keeps_the_pieces(folder, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(embed, "forward_feature", full)
    for size, advice in ((2, "batch_size=1 takes less"), (1, "batch_size is 1 already; ")):
        with pytest.raises(UserError) as caught:
            run(folder, batch_size=size)
        said = str(caught.value)
        assert said.startswith(f"out of memory (2.00 GiB more were wanted): {advice}")
        assert said.endswith("; the same command continues")
    monkeypatch.undo()
    run(folder)
    assert len(read(folder)[0]) == COUNT


def test_interrupting_says_where_the_pieces_are_and_ends_with_130(folder, monkeypatch, capsys):
    monkeypatch.setattr(embed, "PIECE", 2)
    compute, computed = embed.forward_feature, []

    def interrupted(backbone, images, feature):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(len(images))
        return compute(backbone, images, feature)

    monkeypatch.setattr(embed, "forward_feature", interrupted)
    with pytest.raises(SystemExit) as ended:
        run_named("embed", arguments(folder))
    assert ended.value.code == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "interrupted" in line]
    (pieces,) = folder.glob(".*.part")
    assert line.startswith(f"interrupted: finished pieces stay in {pieces}")
    assert len(list(pieces.iterdir())) == 2


def read_file(path):
    """Names, labels and features of a file, by the library that people read it with."""
    if path.suffix == ".parquet":
        frame = pandas.read_parquet(path)
        return list(frame.path), list(frame.label), np.stack(frame.feature)
    if path.suffix == ".csv":
        frame = pandas.read_csv(path)
        return list(frame.path), list(frame.label), frame.filter(regex="^f[0-9]+$").to_numpy()
    if path.suffix == ".npz":
        arrays = np.load(path)  # without pickles
        return arrays["path"].tolist(), arrays["label"].tolist(), arrays["feature"]
    with safe_open(path, "np") as file:
        header = {name: json.loads(file.metadata()[name]) for name in ("ids", "labels")}
        return header["ids"], header["labels"], file.get_tensor("features")


@pytest.mark.parametrize("ending", [".safetensors", ".parquet", ".npz", ".csv"])
def test_every_format_holds_the_same_names_labels_and_numbers(folder, ending):
    out = folder / f"features{ending}"
    made = run(folder, out=str(out))
    names, labels, features = read_file(out)
    assert names == made.names == sorted(f"{'ab'[i % 2]}/{i}.png" for i in range(COUNT))
    assert labels == made.labels == [name[0] for name in names]
    assert features.astype(np.float32).tolist() == made.features.tolist()


@pytest.mark.parametrize("ending", [".safetensors", ".parquet", ".npz", ".csv"])
def test_every_format_takes_names_that_are_not_utf8_and_images_without_labels(folder, ending):
    odd = os.fsdecode(b"\xff.png")
    for path in sorted((folder / "images").rglob("*.png"))[1:]:
        path.unlink()
    os.replace(folder / "images" / "a" / "0.png", folder / "images" / odd)
    out = folder / f"features{ending}"
    assert run(folder, out=str(out)).names == [odd]
    if ending == ".parquet":
        frame = pandas.read_parquet(out)
        assert list(frame.path) == ["\\xff.png"]
        assert "label" not in frame
    if ending == ".csv":
        assert out.read_bytes().splitlines()[1].startswith(b"\xff.png,")


@pytest.mark.parametrize("name", ["a.tsv", "a", "a.safetensors.gz"])
def test_other_formats_are_refused_before_anything_is_read(folder, name):
    with pytest.raises(UserError, match=r"must end in one of .safetensors, .parquet, .npz, .csv"):
        run(folder, out=str(folder / name), checkpoint="nowhere")
    assert sorted(path.name for path in folder.iterdir()) == ["images", "run"]


def test_a_list_of_paths_keeps_its_order(folder):
    names = ["images/b/3.png", "images/a/0.png"]
    (folder / "list.txt").write_text("\n".join(names))
    run(folder, data=data(folder / "list.txt"))
    assert read(folder)[1] == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": "pixels"}, "feature must be native"),
        ({"feature": "last_9"}, "this backbone has 2 blocks"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
        ({"device": "abacus"}, "device=abacus is not available"),
        (
            {"data": data("nowhere")},
            "no such folder",
        ),
        ({"checkpoint": "nowhere"}, "no such file"),
    ],
)
def test_wrong_settings_say_what_is_allowed(folder, changes, message):
    with pytest.raises(UserError, match=message):
        run(folder, **changes)
    assert sorted(path.name for path in folder.iterdir()) == ["images", "run"]


def test_an_existing_file_is_kept(folder):
    (folder / "features.safetensors").write_text("mine")
    with pytest.raises(UserError, match="overwrite=true"):
        run(folder)
    assert (folder / "features.safetensors").read_text() == "mine"


def test_features_that_are_not_finite_are_not_written(folder):
    trunk = make_trunk()
    with torch.no_grad():
        trunk.cls_token.fill_(3e38)
        trunk.blocks[0].mlp.fc2.bias.fill_(3e38)
    save_run(folder / "run", trunk)
    with pytest.raises(UserError, match="makes NaN or infinity"):
        run(folder)
    assert not (folder / "features.safetensors").exists()
