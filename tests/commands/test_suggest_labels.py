"""`msn suggest_labels`: a list, a table and a contact sheet; the honest comparison; mistakes."""

import csv

import pytest
from PIL import Image

from msn.weights import save_backbone
from tests.commands.conftest import TINY
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
    code, out, _ = command("suggest_labels", *arguments, "data.val_root=" + str(images), *where)
    assert code == 0
    assert "random, 2 seeds" in out
    names = (tmp_path / "out" / "suggested.txt").read_text().split()
    assert len(set(names)) == 6
    assert not any("cut" in name for name in names)
    with (tmp_path / "out" / "suggested.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == names
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size[0] > 100


def test_prototypes_of_a_run(command, tmp_path):
    assert command("train", *TINY, f"run.dir={tmp_path / 'run'}")[0] == 0
    arguments = [f"checkpoint={tmp_path / 'run'}", "budget=5", "compare_seeds=0"]
    code, out, _ = command("suggest_labels", *arguments, f"out={tmp_path / 'out'}")
    assert code == 0
    assert "random" not in out
    assert len((tmp_path / "out" / "suggested.txt").read_text().split()) == 5


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
