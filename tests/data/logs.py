"""What was logged, whatever level other tests have left the loggers at."""

import logging


def warnings_in(caplog):
    """Messages of warnings and worse."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
