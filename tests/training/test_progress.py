"""A bar in a terminal or a notebook, lines in a file: each is taken by the trainer that runs."""

import pytest

from msn.training.progress import Bar, Lines, NotebookBar, build_progress
from tests.training.test_module import trainer_of


@pytest.mark.parametrize("display", [Bar, Lines, NotebookBar])
def test_the_trainer_takes_the_display_and_adds_none(tmp_path, display):
    trainer = trainer_of(tmp_path, callbacks=[display()])
    bar = trainer.progress_bar_callback
    assert bar is None if display is Lines else type(bar) is display


def test_the_display_fits_the_output(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(build_progress(), Bar)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert isinstance(build_progress(), Lines)
    monkeypatch.setitem(__import__("sys").modules, "ipykernel", object())
    assert isinstance(build_progress(), NotebookBar)
