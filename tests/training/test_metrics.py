"""metrics.csv: rows, late columns, resumes."""

from msn.files import read_rows
from msn.training.loggers import MetricsCSV
from tests.test_files import largest_file


def test_rows_are_appended_and_late_columns_added(tmp_path):
    log = MetricsCSV(path=tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"a": 2.0, "b": 3.0}, step=2)
    rows = read_rows(tmp_path / "metrics.csv")
    assert rows == [{"step": "1", "a": "1.0", "b": ""}, {"step": "2", "a": "2.0", "b": "3.0"}]


def test_a_resumed_run_goes_on_in_the_same_file_without_doubles(tmp_path):
    path = tmp_path / "metrics.csv"
    for step in (1, 2, 3):
        MetricsCSV(path=path).log_metrics({"a": float(step)}, step=step)
    resumed = MetricsCSV(path=path)
    resumed.resume_at(2)
    resumed.log_metrics({"a": 30.0}, step=3)
    assert [row["a"] for row in read_rows(path)] == ["1.0", "2.0", "30.0"]


def test_what_is_logged_in_one_step_stands_in_one_row(tmp_path):
    log = MetricsCSV(path=tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, step=10)
    log.log_metrics({"a": 2.0}, step=20)
    log.log_metrics({"b": 3.0}, step=20)  # a new column, too
    log.log_metrics({"c": 4.0, "a": 5.0}, step=20)
    log.log_metrics({"b": 6.0}, step=30)
    rows = read_rows(tmp_path / "metrics.csv")
    assert [[row[name] for name in ("step", "a", "b", "c")] for row in rows] == [
        ["10", "1.0", "", ""],
        ["20", "5.0", "3.0", "4.0"],
        ["30", "", "6.0", ""],
    ]


def test_a_full_disk_ends_nothing_and_rows_are_written_when_it_takes_them(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path=path)
    log.log_metrics({"a": 1.0}, step=1)
    with largest_file(path.stat().st_size + 2):  # a part of the next row is written
        log.log_metrics({"a": 2.0}, step=2)
        log.log_metrics({"a": 3.0, "b": 3.0}, step=3)
    assert caplog.text.count("cannot be written: File too large; training goes on") == 1
    log.log_metrics({"a": 4.0}, step=4)
    rows = read_rows(path)
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [
        *(("1", "1.0", ""), ("2", "2.0", ""), ("3", "3.0", "3.0"), ("4", "4.0", "")),
    ]


def test_damaged_rows_are_left_out_on_resume_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,a\n1,1.0\n2,\xff\xfe\n3,3.0,9\n4\n\0\0\0\0,1\nx,1\n5,5.0\n\0\0\0\0\0")
    resumed = MetricsCSV(path=path)
    resumed.resume_at(5)
    assert [row["step"] for row in read_rows(path)] == ["1", "5"]
    assert "5 damaged rows are left out" in caplog.text
    resumed.log_metrics({"a": 6.0}, step=6)
    assert path.read_bytes().split() == [b"step,a", b"1,1.0", b"5,5.0", b"6,6.0"]
