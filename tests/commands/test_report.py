"""`msn report` as a command."""

import pytest

from tests.reporting.runs import make_run


def test_one_run_gets_its_page_and_several_get_one_where_the_user_stands(
    command, tmp_path, monkeypatch
):
    runs = [make_run(tmp_path / name) for name in "ab"]
    code, out, err = command("report", f"runs=[{runs[0]}]", "images=0", "device=cpu")
    assert (code, out.strip()) == (0, f"report: {runs[0] / 'report.html'}"), err
    assert "Pretraining: a<" in (runs[0] / "report.html").read_text()
    code, _, err = command("report", f"runs=[{runs[0]}]", "out=no/such/place.html")
    assert (code, "out=no/such/place.html" in err) == (2, True)
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("report", f"runs=[{runs[0]},{runs[1]}]", "images=0", "device=cpu")
    assert (code, out.strip()) == (0, "report: report.html")
    assert "Pretraining: a, b<" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["runs=[]"], "runs=[]"),
        (["runs=[nowhere]"], "holds no config.yaml"),
        ([], "runs must be given"),
        (["runs=[.]", "images=-1"], "images must be a whole number >= 0, got -1"),
        (["runs=[.]"], "holds no config.yaml"),
    ],
)
def test_mistakes_end_in_a_line(command, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("report", *arguments)
    assert code == 2
    assert told in err
    assert list(tmp_path.iterdir()) == []
