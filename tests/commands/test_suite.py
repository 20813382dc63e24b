"""`eval_lowshot.py suite=...`: several data sets, one table, what is done is kept."""

import json

import pytest

from msn import evaluate
from msn.commands import eval_lowshot
from msn.commands.suite import read_suite
from msn.errors import UserError
from msn.weights import save_backbone
from tests.data.torchvision_copies import make_copies
from tests.weights.builders import MODEL, make_trunk

EIGHT = ["dtd", "aircraft", "cars", "cifar10", "cifar100", "flowers", "food", "pets"]
QUICK = [
    "data.num_workers=0",
    "protocol.shots=[1]",
    "protocol.splits=2",
    "protocol.knn_neighbours=null",
]


@pytest.fixture
def run(tmp_path):
    trunk = make_trunk()
    save_backbone(tmp_path / "run" / "backbone.safetensors", trunk.state_dict(), {"model": MODEL})
    return tmp_path / "run"


def content(place):
    return json.loads((place / "lowshot.json").read_text())


@pytest.mark.slow
def test_the_eight_of_lejepa_as_torchvision_keeps_them(command, tmp_path, run, monkeypatch):
    make_copies(tmp_path / "sets", monkeypatch)
    code, out, err = command(
        "eval_lowshot", "suite=lejepa", f"checkpoint=[a:{run},b:{run}]", "baselines=[pixels]",
        f"data.root={tmp_path / 'sets'}", f"run.dir={tmp_path / 'out'}", "cache_dir=null", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    found = content(tmp_path / "out")
    block, _ = found["blocks"]  # logistic regression; label spreading
    assert block["sets"] == [
        *["dtd", "aircraft", "cars", "cifar10", "cifar100", "flowers", "food", "pets"]
    ]
    assert [line["backbone"] for line in block["lines"]] == ["a", "b", "pixels"]
    sizes = {row["data"]: row["test_images"] for row in found["rows"]}
    assert sizes == {**dict.fromkeys(block["sets"], 12), "flowers": 102}
    a, b, pixels = block["lines"]
    assert a["figures"] == b["figures"]  # the same weights
    assert a["mean"] == pytest.approx(sum(a["figures"].values()) / 8)
    assert a["rank"] == b["rank"]  # ties share their place
    assert a["rank"] + b["rank"] + pixels["rank"] == pytest.approx(6)
    assert min(pixels["figures"][name] for name in block["sets"] if name != "flowers") > 0.9
    assert "flowers" in out
    assert "rank" in (tmp_path / "out" / "lowshot.md").read_text()
    head = found["rows"][0]["head"]
    assert (tmp_path / "out" / head).is_file()


def three(tmp_path, images):
    """A suite of the same folder twice and of one that is not there."""
    (tmp_path / "own.yaml").write_text(
        "one: {source: folder, root: images}\n"
        "two: {source: folder, root: images, hold_out: 0.5}\n"
        "gone: {source: folder, root: away}\n"
    )
    return ["eval_lowshot", f"suite={tmp_path / 'own.yaml'}", f"data.root={tmp_path}",
            "baselines=[]", f"run.dir={tmp_path / 'out'}", "cache_dir=null", *QUICK]  # fmt: skip


def test_a_failing_set_is_left_out_and_tried_again_and_the_others_are_kept(
    command, tmp_path, images, run, monkeypatch
):
    arguments = [*three(tmp_path, images), f"checkpoint=a:{run}"]
    code, out, err = command(*arguments)
    assert code == 2
    assert "error: gone: data.root=" in err
    assert "1 of 3 data sets could not be measured: gone" in err
    assert list(content(tmp_path / "out")["failed"]) == ["gone"]
    assert "left out: gone" in (tmp_path / "out" / "lowshot.md").read_text()
    assert "two" in out
    first = content(tmp_path / "out")["rows"]
    images.rename(tmp_path / "away")  # so that `one` and `two` could not be measured now
    measured = []
    evaluate_once = eval_lowshot.evaluate
    monkeypatch.setattr(
        eval_lowshot, "evaluate", lambda *a, **k: measured.append(1) or evaluate_once(*a, **k)
    )
    code, _, err = command(*arguments)
    assert code == 0, err
    rows = content(tmp_path / "out")["rows"]
    assert rows[: len(first)] == first
    assert {row["data"] for row in rows} == {"one", "two", "gone"}
    assert len(measured) == 1
    assert "holds a finished run" in command(*arguments)[2]


@pytest.mark.parametrize("change", ["protocol.seed=1", "weights"])
def test_other_settings_or_weights_are_measured_again(command, tmp_path, images, run, change):
    arguments = [*three(tmp_path, images), f"checkpoint=a:{run}"]
    assert command(*arguments)[0] == 2
    before = (tmp_path / "out" / "one" / "lowshot.json").read_bytes()
    if change == "weights":
        weights = make_trunk(seed=5).state_dict()
        save_backbone(run / "backbone.safetensors", weights, {"model": MODEL})
        change = "data.num_workers=0"
    assert command(*arguments, change)[0] == 2
    assert (tmp_path / "out" / "one" / "lowshot.json").read_bytes() != before


def test_from_python(tmp_path, images, run):
    (tmp_path / "own.yaml").write_text("one: {source: folder, root: images}\n")
    keys = dict(argument.split("=") for argument in QUICK[2:])
    table = evaluate(
        run, suite=tmp_path / "own.yaml", baselines=[],
        **{"data.root": tmp_path, "protocol.shots": [1], **keys},
    )  # fmt: skip
    assert table[0]["data"] == "one"
    assert "| logistic 1 per class | msn |" in str(table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be names"),
        ("a: {root: x}", "source at least"),
        ("a: {source: folder, rot: x}", "data has no key rot"),
        ("a: [", "cannot be read as YAML"),
        ("a/b: {source: folder}", "a name has letters"),
        (None, "no such file, and no name of configs/suite \\(lejepa\\)"),
    ],
)
def test_a_suite_that_is_none(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_suite(str(path), {"root": None, "source": "digits"})


def test_images_that_are_not_there_are_told_and_not_replaced(tmp_path, command, run, monkeypatch):
    make_copies(tmp_path / "sets", monkeypatch)
    for path in (tmp_path / "sets" / "food-101" / "images").rglob("*.jpg"):
        path.unlink()
    code, _, err = command(
        "eval_lowshot", f"checkpoint={run}", "data=folder", "data.source=food", "baselines=[]",
        f"data.root={tmp_path / 'sets'}", f"run.dir={tmp_path / 'out'}", *QUICK,
    )  # fmt: skip
    assert code == 2
    assert "no image can be read" in err
