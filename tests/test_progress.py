import io
import sys
import time

from msn.api import _quiet
from msn.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, *arguments, **titles):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(*arguments) as progress:
        progress.advance(3, **titles)
    return terminal.getvalue()


def test_a_terminal_shows_how_much_is_done_under_the_newest_title(monkeypatch):
    assert "3/7" in shown(monkeypatch, "probing", 7)
    text = shown(monkeypatch, "looking", title="looking: 3 images")
    assert "looking: 3 images" in text


def test_nothing_is_shown_where_nobody_looks_or_nothing_is_to_be_done(monkeypatch, capsys):
    assert shown(monkeypatch, "probing", 7, False) == ""
    assert shown(monkeypatch, "probing", 0) == ""
    monkeypatch.undo()
    with Progress("probing", 7) as progress:
        progress.advance()
    assert capsys.readouterr() == ("", "")


def test_a_notebook_shows_a_line_that_moves_also_of_a_quiet_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    with _quiet(), Progress("probing", 7) as progress:
        print("for a terminal")
        progress.advance(1)
        time.sleep(0.11)  # tqdm draws no more often
        progress.advance(2)
        progress.advance(4, title="probed")
    seen = capsys.readouterr()
    assert "probing:   0%" in seen.out
    assert "probing:  43%" in seen.out
    assert "for a terminal" not in seen.out
    assert "\n" not in seen.out
    assert seen.err == ""
