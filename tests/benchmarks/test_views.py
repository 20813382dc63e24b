"""`benchmarks/views.py` writes the rows that are promised."""

import json

import pytest

from benchmarks import views
from tests.data.photos import make_folder

ROWS = ["decode", "worker", "pil_recipe", "reference_views", "batched_views_cpu"]


@pytest.mark.parametrize(("only", "names"), [("null", ROWS), ("[decode,worker]", ROWS[:3])])
def test_rows_of_the_data_path(script, tmp_path, monkeypatch, only, names):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    root = make_folder(tmp_path / "in", classes=1, images=2)
    file = tmp_path / "rows.json"
    code, out, err = script(views, f"images={root}", f"only={only}", f"json={file}")
    assert code == 0, err
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == names
    recipe = rows[2]
    for row in rows:
        assert row["name"] in out
        assert row["images_per_s"] == pytest.approx(1000 / row["milliseconds"])
        assert row["ratio_to_pil"] == pytest.approx(row["images_per_s"] / recipe["images_per_s"])
    assert ("views_milliseconds" in rows[-1]) == (only == "null")


def test_a_way_that_there_is_not_is_told(script):
    code, _, err = script(views, "only=[fast]")
    assert (code, err.startswith("error: only=['fast']: must be null or some of [decode,")) == (
        2,
        True,
    )
