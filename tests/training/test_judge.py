"""verdicts.csv survives a full disk and what damages it."""

from msn.training.judge import Judge, read_verdicts
from tests.test_files import largest_file

ROW = {"step": "3", "epoch": "1", "verdict": "learning", "line": "a, b"}


def test_a_full_disk_at_a_verdict_ends_nothing_and_the_next_epoch_writes_all(tmp_path, caplog):
    judge = Judge(directory=tmp_path, on_collapse="warn")
    judge._rows = [ROW]
    with largest_file(10):
        judge._write()
    assert "verdicts.csv cannot be written: File too large; training goes on" in caplog.text
    judge._rows.append({**ROW, "step": "6"})
    judge._write()
    assert [row["step"] for row in read_verdicts(tmp_path / "verdicts.csv")] == ["3", "6"]


def test_damaged_verdicts_are_left_out(tmp_path):
    path = tmp_path / "verdicts.csv"
    path.write_bytes(b'step,epoch,verdict,line\n3,1,learning,"a, b"\n6,2\nx,3,warn,c\n\0\0\0\xff')
    assert read_verdicts(path) == [ROW]
    path.write_bytes(b"\0" * 100)
    assert read_verdicts(path) == []
