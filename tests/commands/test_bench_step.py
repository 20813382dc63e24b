"""`msn bench what=step`: rows, parts and mistakes."""

import json

import pytest

TINY = [
    "experiment=digits",
    "model.depth=2",
    "batch_size=4",
    "rounds=1",
    "against=[eager_yardstick]",
]


@pytest.mark.slow
def test_rows_measure_all_methods_of_one_case(command, tmp_path):
    code, out, _ = command("bench", "what=step", *TINY, f"json={tmp_path / 'rows.json'}")
    assert code == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["msn", "eager_yardstick", "matmul_limit"]
    ours, limit = rows["msn"], rows["matmul_limit"]
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(4 / row["s_per_step"])
        flops = row["flops_per_s"] * row["s_per_step"]
        assert flops == pytest.approx(ours["flops_per_s"] * ours["s_per_step"])
        assert row["share_of_limit"] == pytest.approx(row["flops_per_s"] / limit["flops_per_s"])
    parts = ours["parts"]
    assert list(parts) == ["views", "target", "anchors", "loss", "backward", "optimiser", "ema"]
    assert min(parts.values()) > 0
    assert ours["peak_bytes"] > 0
    assert "backward" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch_size=1"], "batch_size must be a whole number >= 2"),
        (["rounds=0"], "rounds must be a whole number >= 1"),
        (["against=[vissl]"], "allowed are eager_yardstick, lightly"),
        (["trainer.precision=8-true"], "trainer.precision must be in"),
        (["data.views.rand_views=-1"], "rand_views=-1"),
        (["experiment=nope"], "nope"),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, message):
    code, _, err = command("bench", "what=step", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
