"""`msn suggest_labels`: a list, a table and a contact sheet; the honest comparison; mistakes."""

import csv
import errno
import os

import pytest
from PIL import Image

from msn.commands import suggest_labels
from msn.weights import save_backbone
from tests.commands.conftest import QUICK
from tests.weights.builders import make_trunk


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    trunk = make_trunk()
    path = tmp_path_factory.mktemp("run") / "backbone.safetensors"
    save_backbone(path, trunk.state_dict(), {"model": trunk.model_config})
    return path


def test_medoids_of_any_backbone_with_the_comparison(command, tmp_path, images, export):
    Image.new("RGB", (40, 36)).save(tmp_path / "images" / "class0" / "cut.png")
    cut = tmp_path / "images" / "class0" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:60])
    arguments = [f"checkpoint={export}", "budget=6", "choose=medoids", "compare_seeds=2"]
    where = ["data=folder", f"data.root={images}", f"out={tmp_path / 'out'}"]
    code, out, _ = command("suggest_labels", *arguments, *where)
    assert code == 0
    assert "random, 2 seeds" in out
    names = (tmp_path / "out" / "suggested.txt").read_text().split()
    assert len(set(names)) == 6
    assert not any("cut" in name for name in names)
    with (tmp_path / "out" / "suggested.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == names
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size[0] > 100


def test_prototypes_of_a_run_on_any_folder_with_one_look_at_the_images(
    command, tmp_path, images, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSN_CACHE_DIR", str(tmp_path / "cache"))
    assert command("train", *QUICK, f"run.dir={tmp_path / 'run'}")[0] == 0
    arguments = [f"checkpoint={tmp_path / 'run'}", f"data.root={images}", "budget=5"]
    code, out, err = command("suggest_labels", *arguments, "compare_seeds=0")
    assert code == 0, err
    assert "random" not in out
    found = sorted(path.name for path in (tmp_path / "suggested_labels").iterdir())
    assert found == ["contact_sheet.png", "suggested.csv", "suggested.txt"]
    assert len((tmp_path / "suggested_labels" / "suggested.txt").read_text().split()) == 5
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 1


def test_the_image_size_counts_and_a_failed_writing_leaves_nothing(
    command, tmp_path, images, export, monkeypatch
):
    arguments = [f"checkpoint={export}", f"data.root={images}", "budget=2", "choose=medoids"]
    arguments += [f"out={tmp_path / 'out'}", "cache_dir=null"]
    code, _, err = command("suggest_labels", *arguments, "features.image_size=30")
    assert (code, "image_size=30" in err) == (2, True)

    def full(path, names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(suggest_labels, "write_names", full)
    code, _, err = command("suggest_labels", *arguments)
    assert (code, "No space left" in err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["budget=2"], "has no head and prototypes"),
        (["budget=0", "choose=medoids"], "budget=0: must be a whole number >= 1"),
        (["budget=99999", "choose=medoids"], "budget=99999: must be in [1, 1297]"),
        (["budget=2", "choose=best"], "choose=best: must be one of prototypes, medoids"),
        (["choose=medoids"], "budget must be given"),
    ],
)
def test_mistakes_leave_nothing(command, tmp_path, export, arguments, message):
    out = tmp_path / "out"
    code, _, err = command("suggest_labels", f"checkpoint={export}", f"out={out}", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not out.exists()
