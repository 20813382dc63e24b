"""`python -m msn rank`: every checkpoint of a run on the same unlabelled images."""

import json
import math

import pytest

import msn
from msn.commands.rank import expand
from msn.weights import save_backbone
from tests.weights.builders import MODEL, make_trunk


def test_a_table_and_its_figures(command, tmp_path):
    for name, scale in (("a", 1.0), ("b", 1.0), ("flat", 0.0)):
        weights = {key: value * scale for key, value in make_trunk().state_dict().items()}
        save_backbone(tmp_path / name / "backbone.safetensors", weights, {"model": MODEL})
    places = ",".join(f"{name}:{tmp_path / name}" for name in ("a", "b", "flat"))
    code, out, err = command(
        "rank", f"checkpoint=[{places}]", f"json={tmp_path / 'rank.json'}", "images=40", "views=2",
        "cache_dir=null",
    )  # fmt: skip
    assert code == 0, err
    a, b, flat = json.loads((tmp_path / "rank.json").read_text())["rows"]
    assert {**a, "backbone": ""} == {**b, "backbone": ""}
    assert 1 < a["rankme"] < 40
    assert flat["rankme"] == flat["lidar"] == 0
    assert flat["alpha"] is None  # infinite
    assert "flat" in out
    assert "0.00 (3)" in out
    assert all(math.isfinite(value) for key, value in a.items() if key != "backbone")


def test_from_python(tmp_path):
    for name in ("a", "b"):
        save_backbone(
            tmp_path / name / "backbone.safetensors", make_trunk().state_dict(), {"model": MODEL}
        )
    places = {"a": tmp_path / "a", "b": tmp_path / "b"}
    table = msn.rank(places, "digits", images=40, views=2, cache_dir=None)
    assert [row["backbone"] for row in table] == ["a", "b"]
    assert table.to_pandas()["rankme"].between(1, 40).all()
    for text in (str(table), table._repr_html_()):
        assert f"{table[0]['rankme']:.2f} (1)" in text


def test_a_run_directory_stands_for_its_checkpoints(tmp_path):
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    for name in ("epoch-10-step-100.ckpt", "epoch-2-step-20.ckpt", "notes.txt"):
        (place / name).touch()
    files = [place / "epoch-2-step-20.ckpt", place / "epoch-10-step-100.ckpt"]
    assert expand(str(tmp_path / "run")) == [f"run-{file.stem}:{file}" for file in files]
    assert expand([f"x:{tmp_path / 'run'}", "y:other"]) == [
        *(f"x-{file.stem}:{file}" for file in files),
        "y:other",
    ]


@pytest.mark.parametrize("wrong", ["images=31", "views=1"])
def test_too_few_images_or_views(command, wrong):
    code, _, err = command("rank", "checkpoint=no", wrong)
    assert code == 2
    assert f"{wrong.partition('=')[0]} must be" in err
