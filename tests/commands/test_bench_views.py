"""`msn bench what=views` and `what=decode` write the rows that are promised."""

import json

import pytest

from tests.data.photos import make_folder

ROWS = ["decode", "worker", "pil_recipe", "reference_views", "batched_views_cpu"]


@pytest.mark.parametrize(("what", "names"), [("views", ROWS), ("decode", ROWS[:3])])
def test_rows_of_the_data_path(command, tmp_path, monkeypatch, what, names):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    root = make_folder(tmp_path / "in", classes=1, images=2)
    file = tmp_path / "rows.json"
    code, out, err = command("bench", f"what={what}", f"images={root}", f"json={file}")
    assert code == 0, err
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == names
    recipe = rows[2]
    for row in rows:
        assert row["name"] in out
        assert row["images_per_s"] == pytest.approx(1000 / row["milliseconds"])
        assert row["ratio_to_pil"] == pytest.approx(row["images_per_s"] / recipe["images_per_s"])
    assert ("views_milliseconds" in rows[-1]) == (what == "views")


def test_a_folder_with_an_image_that_cannot_be_read_is_refused(command, tmp_path):
    root = make_folder(tmp_path / "in", classes=1, images=2)
    (root / "class_0" / "0.jpg").write_bytes(b"")
    code, _, err = command("bench", "what=views", f"images={root}")
    assert code == 2
    assert "class_0/0.jpg cannot be read (empty file)" in err
