"""metrics.csv: rows, late columns, resumes."""

from msn.training.metrics import MetricsCSV, read_metrics


def test_rows_are_appended_and_late_columns_added(tmp_path):
    log = MetricsCSV(path=tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"a": 2.0, "b": 3.0}, step=2)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows == [{"step": "1", "a": "1.0", "b": ""}, {"step": "2", "a": "2.0", "b": "3.0"}]


def test_a_resumed_run_goes_on_in_the_same_file_without_doubles(tmp_path):
    path = tmp_path / "metrics.csv"
    for step in (1, 2, 3):
        MetricsCSV(path=path).log_metrics({"a": float(step)}, step=step)
    resumed = MetricsCSV(path=path)
    resumed.resume_at(2)
    resumed.log_metrics({"a": 30.0}, step=3)
    assert [row["a"] for row in read_metrics(path)] == ["1.0", "2.0", "30.0"]


def test_what_is_logged_in_one_step_stands_in_one_row(tmp_path):
    log = MetricsCSV(path=tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, step=10)
    log.log_metrics({"a": 2.0}, step=20)
    log.log_metrics({"b": 3.0}, step=20)  # a new column, too
    log.log_metrics({"c": 4.0, "a": 5.0}, step=20)
    log.log_metrics({"b": 6.0}, step=30)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [[row[name] for name in ("step", "a", "b", "c")] for row in rows] == [
        ["10", "1.0", "", ""],
        ["20", "5.0", "3.0", "4.0"],
        ["30", "", "6.0", ""],
    ]
