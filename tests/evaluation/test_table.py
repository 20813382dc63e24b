import csv
import json
import re

import pytest
import torch
from PIL import Image

from msn.errors import UserError
from msn.evaluation.lowshot import evaluate
from msn.evaluation.outcomes import Outcome, interval, resampled
from msn.evaluation.sets import make_row
from msn.evaluation.table import markdown_table, print_table, write_results
from msn.weights.classifier import read_classifier
from tests.evaluation.test_protocols import kshot
from tests.evaluation.toys import MODEL, ToyImages, toy_backbone

SCHEMA = {"backbone", "classifier", "labels", "splits", "top1_mean", "top1_std", "lambda"}


@pytest.fixture(scope="module")
def results():
    return evaluate(
        kshot(),
        [toy_backbone(), toy_backbone(1, "other")],
        ToyImages(6),
        ToyImages(5, seed=1),
        num_workers=0,
        device=torch.device("cpu"),
    )


def test_json_csv_markdown_and_pictures_say_the_same(tmp_path, results):
    write_results(tmp_path / "lowshot.json", results, {"seed": 0})
    content = json.loads((tmp_path / "lowshot.json").read_text())
    assert set(content) == {"rows", "config", "versions"}
    assert len(content["rows"]) == 6
    with (tmp_path / "lowshot.csv").open() as file:
        lines = list(csv.DictReader(file))
    table = (tmp_path / "lowshot.md").read_text()
    for row, line in zip(content["rows"], lines, strict=True):
        assert set(row) >= SCHEMA
        assert 0 <= row["top1_mean"] <= 1
        low, high = row["interval"]
        assert low <= row["top1_mean"] <= high
        assert float(line["top1_mean"]) == row["top1_mean"]
        assert f"{100 * row['top1_mean']:.1f}" in table
    assert Image.open(tmp_path / "lowshot.png").size[0] > 500
    assert "<svg" in (tmp_path / "lowshot.svg").read_text()


@pytest.mark.parametrize("suffix", ["json", "csv", "md", "png", "svg"])
def test_two_writings_are_equal_byte_for_byte(tmp_path, results, suffix):
    for name in ("a", "b"):
        write_results(tmp_path / name / "lowshot.json", results, {"seed": 0})
    one, other = (tmp_path / name / f"lowshot.{suffix}" for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()


def test_kept_heads_classify_as_the_table_says(tmp_path, results):
    write_results(tmp_path / "lowshot.json", results, {})
    row = json.loads((tmp_path / "lowshot.json").read_text())["rows"][0]
    head = read_classifier(tmp_path / row["head"], MODEL["embed_dim"])
    backbone, test = toy_backbone(), ToyImages(5, seed=1)
    with torch.no_grad():
        images = torch.stack([backbone.transform(test[i]) for i in range(len(test))])
        rows = backbone.trunk.forward_features(images, norm=False)[:, 0]
    rows = torch.nn.functional.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)
    correct = (rows @ head.weight.T).argmax(dim=1) == test.labels
    assert float(correct.double().mean()) == pytest.approx(row["top1"][0], abs=1e-9)
    assert list(head.classes) == test.classes


NAME = "=a|<b>[x](y)*\n\udce9$q"


@pytest.fixture
def named(results):
    """The same results of a backbone with a name that is a formula, a tag and no UTF-8."""
    return [result._replace(row={**result.row, "backbone": NAME}) for result in results[:3]]


def test_names_stay_cells_and_text_in_every_file(tmp_path, named):
    write_results(tmp_path / "lowshot.json", named, {})
    with (tmp_path / "lowshot.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["backbone"] == "'=a|<b>[x](y)*\n?$q"
    assert lines[0]["labels"] == "1"
    assert float(lines[0]["top1_mean"]) == named[0].row["top1_mean"]
    row = (tmp_path / "lowshot.md").read_text(encoding="utf-8").splitlines()[2]
    assert row.startswith(r"| =a\|&lt;b&gt;\[x\](y)\*??$q | ")
    assert (tmp_path / "lowshot.svg").exists()


@pytest.mark.parametrize("width", [30, 60, 200])
def test_no_figure_is_cut_on_a_narrow_terminal(named, monkeypatch, capsys, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(named, "labels from 30 images, 25 held out")
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "=a|<b>[x](y)*??$q" in shown
    for row in (result.row for result in named):
        low, high = row["interval"]
        assert f"{100 * row['top1_mean']:.1f}" in shown
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in shown
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, results):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_results(tmp_path / "file" / "lowshot.json", results, {})


def test_the_interval_is_that_of_a_binomial():
    correct = torch.rand(1, 400, generator=torch.Generator().manual_seed(0)) < 0.8
    outcome = Outcome(torch.ones(400, dtype=torch.long), correct.long(), ["a", "b"])
    low, high = interval(resampled(outcome).top1)
    mean = float(correct.double().mean())
    half = 1.96 * (mean * (1 - mean) / 400) ** 0.5
    assert low == pytest.approx(mean - half, abs=0.008)
    assert high == pytest.approx(mean + half, abs=0.008)
    assert interval(resampled(outcome).top1) == (low, high)


def test_a_row_that_did_not_converge_says_so_loudly():
    row = make_row(
        backbone="msn",
        classifier="logistic",
        labels="1",
        outcome=Outcome(torch.arange(4), torch.arange(4).expand(2, -1), list("abcd")),
        splits=["a", "b"],
        lambda_=0.1,
        lambd=1.0,
        lambda_choice="fixed",
        converged=False,
    )
    assert "NOT CONVERGED" in markdown_table([row])
    assert "NOT CONVERGED" not in markdown_table([{**row, "converged": True}])
