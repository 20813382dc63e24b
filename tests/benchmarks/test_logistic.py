"""`benchmarks/logistic.py`: its row, and mistakes in one line; both as every script has them."""

import json

import pytest

from benchmarks import logistic

SMALL = ["n=60", "d=8", "classes=3"]


def test_rows_are_written_as_a_list_of_objects(script, tmp_path):
    code, out, _ = script(logistic, *SMALL, f"json={tmp_path / 'rows.json'}")
    assert code == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["name"] == "logistic"
    assert row["certified_relative_gap"] <= 1e-6
    assert "objective" in out


def test_help_names_the_keys(script):
    code, out, _ = script(logistic, "--help")
    assert (code, "json=FILE" in out, "tolerance=1e-06" in out) == (0, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images=DIR"], "unknown key images: allowed are json, features"),
        (["n"], "unknown key n"),
        (["n=1"], "n must be a whole number >= 2, got 1"),
        (["lambd=abc"], "lambd=abc: must be a number > 0"),
        (["seed=x"], "seed must be a whole number >= 0, got 'x'"),
        (["device=gpu"], "device=gpu is not available on this machine"),
        (["features=/no/such.safetensors"], "no such file"),
        (["json=/no/such/rows.json"], "json=/no/such/rows.json"),
    ],
)
def test_mistakes_end_in_one_line(script, arguments, message):
    code, _, err = script(logistic, *SMALL, *arguments)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
