import sys

import pytest


@pytest.fixture
def script(capfd, monkeypatch):
    """Run a script's main function: exit code, standard output, standard error."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        out = capfd.readouterr()
        return code, out.out, out.err

    return run
