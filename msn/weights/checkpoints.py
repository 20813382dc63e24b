"""Checkpoint files by name: `epoch-E-step-S.ckpt`; times do not survive a copy, names do."""

import logging
import re
from pathlib import Path

from msn.files import damage

log = logging.getLogger(__name__)

_NAME = re.compile(r"epoch-(\d+)-step-(\d+)\.ckpt")


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoint files of a directory, oldest first; none where there is no directory."""
    if not directory.is_dir():
        return []
    files = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(files, key=epoch_and_step)


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint file of a directory, None if there is none."""
    files = checkpoints(directory)
    return files[-1] if files else None


def newest_valid_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint file that is whole; damaged ones are named in the log and passed over.

    Reads each file that it considers once.
    """
    for path in reversed(checkpoints(directory)):
        reason = damage(path)
        if reason is None:
            return path
        log.warning("checkpoint %s is damaged (%s): skipped", path, reason)
    return None


def epoch_and_step(path: Path) -> tuple[int, int]:
    """Finished epochs and optimiser steps of a checkpoint, by its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])
