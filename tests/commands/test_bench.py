"""`msn bench`: settings of the chosen part alone, rows kept where json= says."""

import json

import pytest

SMALL = ["what=logistic", "n=60", "d=8", "classes=3"]


def test_rows_are_written_as_a_list_of_objects(command, tmp_path):
    code, out, _ = command("bench", *SMALL, f"json={tmp_path / 'rows.json'}")
    assert code == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["name"] == "logistic"
    assert row["certified_relative_gap"] <= 1e-6
    assert "objective" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["what=nope"], "allowed are"),
        ([*SMALL, "images=DIR"], "unknown key images"),
        ([*SMALL, "+images=DIR"], "unknown key images"),
        ([*SMALL, "n=1"], "n=1: must be a whole number >= 2"),
        ([*SMALL, "lambd=abc"], "lambd=abc: must be a number > 0"),
        ([*SMALL, "seed=x"], "seed=x: must be a whole number >= 0"),
        ([*SMALL, "device=gpu"], "device=gpu is not available on this machine"),
        ([*SMALL, "features=/no/such.safetensors"], "no such file"),
        ([*SMALL, "json=/no/such/rows.json"], "json=/no/such/rows.json"),
        (["what=inference", "model=nope"], "allowed are"),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, message):
    code, _, err = command("bench", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
