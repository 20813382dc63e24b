"""Choose, lock and describe the directory of a run."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from msn.errors import UserError
from msn.files import write_atomically
from msn.schema import as_argument
from msn.training.judge import VERDICTS_FILE
from msn.training.loggers import ID_FILE
from msn.weights.reading import newest_valid_checkpoint

log = logging.getLogger(__name__)

STATUS_FILE = "run.json"
CONFIG_FILE = "config.yaml"
LOCK_FILE = "run.lock"
CHECKPOINTS = "checkpoints"
# Files of an earlier attempt, which a run that starts again must not continue.
_OF_BEFORE = (CHECKPOINTS, "metrics.csv", VERDICTS_FILE, "tensorboard", ID_FILE)
# Names the directory for processes that the trainer starts itself.
ENVIRONMENT = "MSN_RUN_DIRECTORY"
RESUME_MODES = ("auto", "never")


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes. `reserve` makes and locks it, `create` writes the first files."""

    path: Path
    resume_from: Path | None
    """Checkpoint of an unfinished run in it; known after `reserve`."""
    mode: str = "auto"
    """One of `RESUME_MODES`."""
    is_training: bool = True
    """True for a pretraining run, False for an evaluation."""
    is_numbered: bool = False
    """Whether it has a new number, which another run may take first."""
    made: tuple[Path, ...] = ()
    """Directories that `reserve` has made, the innermost first."""

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.path / CHECKPOINTS

    def reserve(self) -> "RunDirectory":
        """Make and lock the directory; a numbered run takes the next free number.

        Raises:
            OSError: if it cannot be made.
            UserError: if another process uses it or has finished it meanwhile.
        """
        if is_inherited():
            return self
        path = self.path
        made = [p for p in (path, *path.parents) if not p.exists()]
        while True:
            try:
                path.mkdir(parents=True, exist_ok=not self.is_numbered)
                break
            except FileExistsError:
                path = path.with_name(str(int(path.name) + 1))
        made = [path, *made[1:]] if self.is_numbered else made
        reserved = replace(self, path=path, made=tuple(made))
        with reserved.given_back_on_failure():
            _lock(path)
            if _is_unfinished(path, self.mode, is_training=self.is_training):
                status = read_status(path).get("status", "missing")
                if status in ("damaged", "missing"):
                    log.warning("%s is %s: writing it again", path / STATUS_FILE, status)
                if not (path / CONFIG_FILE).exists():
                    log.warning("%s is missing: writing it again", path / CONFIG_FILE)
                newest = newest_valid_checkpoint(reserved.checkpoints)
                reserved = replace(reserved, resume_from=newest)
        return reserved

    def hand_down(self) -> None:
        """Pass this directory to processes that the trainer will start, see `ENVIRONMENT`."""
        resume_from = None if self.resume_from is None else str(self.resume_from.absolute())
        os.environ[ENVIRONMENT] = json.dumps([str(self.path.absolute()), resume_from])

    @contextlib.contextmanager
    def given_back_on_failure(self) -> Iterator[None]:
        """Within, an error removes the directories that were made for the run."""
        try:
            yield
        except BaseException:
            if self.made and self.path / LOCK_FILE in [file for file, _ in _locked]:
                shutil.rmtree(self.path, ignore_errors=True)  # this process has made all in it
            for path in self.made:
                with contextlib.suppress(OSError):  # not empty: it is in use
                    path.rmdir()
            raise

    def create(self, config: DictConfig) -> None:
        """Make the directory and save the resolved configuration.

        Raises:
            OSError: if it cannot be written.
        """
        # First, so that the directory counts as a run even if the disk is then full.
        self.write_status("unfinished")
        text = OmegaConf.to_yaml(config, resolve=True)
        write_atomically(self.path / CONFIG_FILE, lambda file: file.write(text.encode()))

    def begin_again(self) -> None:
        """Move the files of an unfinished run without a valid checkpoint aside, and log it.

        Raises:
            OSError: if it cannot be moved.
        """
        if not _holds_run(self.path) or self.resume_from is not None:
            return
        self.write_status("unfinished")  # else nothing shows it once the checkpoints are moved
        left = [self.path / name for name in _OF_BEFORE]
        left = [
            place for place in left if place.is_file() or (place.is_dir() and any(place.iterdir()))
        ]
        kept = ""
        if left:
            number = 1
            while (aside := self.path / f"before-{number}").exists():
                number += 1
            aside.mkdir()
            for place in left:
                place.rename(aside / place.name)
            kept = f"; its files are kept in {aside}"
        log.warning(
            "%s: an unfinished run without a valid checkpoint: it starts again from step 0%s",
            *(self.path, kept),
        )

    def write_status(self, status: str, **more: Any) -> None:
        """Write "unfinished" or "finished", and further facts of the run, to run.json."""
        facts = {**read_status(self.path), "status": status, **more}
        text = json.dumps(facts, indent=1)
        write_atomically(self.path / STATUS_FILE, lambda file: file.write(text.encode()))


def choose_run_directory(config: DictConfig) -> RunDirectory:
    """The directory of a run: `run.dir`, else `run.root/experiment/run.name`, else a new number.

    Under srun a run without a name is named by its job, so that a requeued job finds it again.
    One of several processes chooses, see `msn.training.launch.agree`; processes that the trainer
    starts itself take its choice.

    Raises:
        UserError: if a finished run or something else is there, or `resume` does not allow it.
    """
    if is_inherited():
        path, resume_from = json.loads(os.environ[ENVIRONMENT])
        return RunDirectory(Path(path), None if resume_from is None else Path(resume_from))
    names = {key: _text(f"run.{key}", config.run[key]) for key in ("root", "experiment")}
    parent = Path(names["root"]) / names["experiment"]
    name = _job_name(parent) if config.run.name is None else _text("run.name", config.run.name)
    mode = config.resume.mode
    if mode not in RESUME_MODES:
        raise UserError(f"resume.mode={mode}: must be one of {', '.join(RESUME_MODES)}")
    is_numbered = config.run.dir is None and name is None
    path = _new_number(parent) if is_numbered else parent / str(name)
    if config.run.dir is not None:
        path = Path(_text("run.dir", config.run.dir))
    is_training = "trainer" in config
    _is_unfinished(path, mode, is_training=is_training)
    _check_writable(path)
    return RunDirectory(path, None, mode, is_training, is_numbered)


def is_inherited() -> bool:
    """Whether the trainer in another process has started this one."""
    return ENVIRONMENT in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def forget_directory() -> None:
    """Unlock the directory after a run, and do not pass it to processes that start later."""
    _unlock()
    if not is_inherited():
        os.environ.pop(ENVIRONMENT, None)


def read_status(path: Path) -> dict[str, Any]:
    """Content of a run directory's run.json; empty without one.

    Raises:
        UserError: if it is not a file.
    """
    file = path / STATUS_FILE
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a file: remove it, or choose another run.dir")
    if not file.is_file():
        return {}
    try:
        status = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        status = None
    whole = isinstance(status, dict) and "status" in status
    return status if whole else {"status": "damaged"}


def _text(key: str, value: Any) -> str:
    """A value as text; a name may be a number: run.name=3."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise UserError(f"{key} must be text, got {value!r}")
    return str(value)


def _is_unfinished(path: Path, resume: str, *, is_training: bool) -> bool:
    """Whether there is an unfinished run at a path.

    Raises:
        UserError: if there is something that a new run must not touch.
    """
    if not path.exists():
        return False
    if not path.is_dir():
        raise UserError(f"run directory {path} is a file")
    status = read_status(path).get("status")
    # A process that was killed, or ran out of disk, may have left these.
    others = [p for p in path.iterdir() if p.name != LOCK_FILE and not p.match(".*.tmp")]
    if status is None and is_training and _holds_run(path):
        status = "missing"
    if status is None and others:
        raise UserError(f"{path} is not empty and holds no run: choose another run.dir")
    if status == "finished":
        no_report = is_training and not (path / "report.html").exists()
        report = f"; python -m msn report {as_argument('runs', path)} makes its report"
        hint = report if no_report else ""
        raise UserError(f"{path} holds a finished run: choose another run.name or run.dir{hint}")
    if not is_training and (path / CHECKPOINTS).exists():
        raise UserError(f"{path} holds a training run: choose another run.dir")
    if status is not None and resume == "never":
        raise UserError(f"{path} holds an unfinished run and resume=never")
    return status is not None


def _holds_run(path: Path) -> bool:
    """Whether a training run has started there, even if run.json is lost."""
    return (path / STATUS_FILE).is_file() or any((path / CHECKPOINTS).glob("*.ckpt"))


_locked: list[tuple[Path, int]] = []  # of this process; its record locks end with it


def _lock(path: Path) -> None:
    """Keep other processes out of a directory until this one ends or `_unlock` is called.

    Raises:
        UserError: if another process has it.
    """
    file = path / LOCK_FILE
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{path} is in use by {holder}: wait for it, or choose another run.dir"
                ) from None
            log.warning("%s cannot be locked: %s", path, error.strerror)
            return
        # Else the holder has just removed the file, and a third process may make a new one.
        if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
            break
        os.close(handle)
    with contextlib.suppress(OSError):  # a full disk: the lock holds, without a name
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
    _locked.append((file, handle))


def _unlock() -> None:
    while _locked:
        file, handle = _locked.pop()
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(handle)


def _job_name(parent: Path) -> str | None:
    """A name that stays the same when SLURM requeues the job; None outside SLURM."""
    if "SLURM_STEP_ID" not in os.environ or "SLURM_JOB_ID" not in os.environ:
        return None
    name = f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_STEP_ID']}"
    finished = read_status(parent / name).get("status") == "finished"
    return None if finished else name  # a step may make several runs, one after another


def _new_number(parent: Path) -> Path:
    taken = [int(p.name) for p in parent.iterdir() if p.name.isdigit()] if parent.is_dir() else []
    return parent / str(max(taken, default=-1) + 1)


def _check_writable(path: Path) -> None:
    """The nearest existing parent must be a directory that takes new entries."""
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"run directory {path} cannot be written: {parent} is not a writable directory"
        )
