"""One directory a run: which one, whether it may be used, and what it says of itself."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from msn.errors import UserError
from msn.files import write_atomically
from msn.weights.checkpoints import newest_valid_checkpoint

STATUS_FILE = "run.json"
# Processes that the trainer starts itself inherit the directory that the first one chose.
ENVIRONMENT = "MSN_RUN_DIRECTORY"
RESUME_MODES = ("auto", "never")


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes; nothing exists before `create`."""

    path: Path
    resume_from: Path | None
    """Checkpoint of an unfinished run that stands there."""
    is_numbered: bool = False
    """Whether it is a new number, which another run may take first."""
    made: tuple[Path, ...] = ()
    """Directories that `reserve` has made, the innermost first."""

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.path / "checkpoints"

    def reserve(self) -> "RunDirectory":
        """Make the directory of a numbered run, the next number where another run was faster.

        Raises:
            OSError: if it cannot be made.
        """
        path = self.path
        made = [p for p in (path, *path.parents) if not p.exists()]
        while self.is_numbered:
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                path = path.with_name(str(int(path.name) + 1))
        made = [path, *made[1:]] if self.is_numbered else []
        return replace(self, path=path, made=tuple(made))

    def hand_down(self) -> None:
        """Let processes that the trainer will start itself take this one, see `ENVIRONMENT`."""
        resume_from = None if self.resume_from is None else str(self.resume_from.absolute())
        os.environ[ENVIRONMENT] = json.dumps([str(self.path.absolute()), resume_from])

    @contextlib.contextmanager
    def given_back_on_failure(self) -> Iterator[None]:
        """What was reserved and is still empty does not outlive an error."""
        try:
            yield
        except BaseException:
            for path in self.made:
                with contextlib.suppress(OSError):  # not empty: it is in use
                    path.rmdir()
            raise

    def create(self, config: DictConfig) -> None:
        """Make the directory and save the resolved configuration.

        Raises:
            OSError: if it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(config, resolve=True)
        write_atomically(self.path / "config.yaml", lambda file: file.write(text.encode()))
        self.write_status("unfinished")

    def write_status(self, status: str, **more: Any) -> None:
        """Keep "unfinished" or "finished" and further facts of the run in run.json."""
        facts = {**read_status(self.path), "status": status, **more}
        text = json.dumps(facts, indent=1)
        write_atomically(self.path / STATUS_FILE, lambda file: file.write(text.encode()))


def choose_run_directory(config: DictConfig) -> RunDirectory:
    """The directory of a run: `run.dir`, else `run.root/experiment/run.name`, else a new number.

    Under srun a run without a name is named by its job, so that a requeued job finds it again.
    Of several processes one chooses, see `msn.training.launch.agree`; processes that the trainer
    starts itself take what the one that started them has chosen.

    Raises:
        UserError: if a finished run or something else stands there, or `resume` does not allow it.
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
    if config.run.dir is None and name is None:
        run = RunDirectory(_new_number(parent), None, is_numbered=True)
    else:
        given = config.run.dir
        path = parent / str(name) if given is None else Path(_text("run.dir", given))
        run = _existing(path, mode) or RunDirectory(path, None)
    _check_writable(run.path)
    return run


def is_inherited() -> bool:
    """Whether the trainer of another process has started this one."""
    return ENVIRONMENT in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def forget_directory() -> None:
    """After a run: what this process starts later is no part of it."""
    if not is_inherited():
        os.environ.pop(ENVIRONMENT, None)


def read_status(path: Path) -> dict[str, Any]:
    """What run.json of a run directory says, empty where there is none."""
    file = path / STATUS_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def _text(key: str, value: Any) -> str:
    """A name may be a number: run.name=3."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise UserError(f"{key} must be text, got {value!r}")
    return str(value)


def _existing(path: Path, resume: str) -> RunDirectory | None:
    if not path.exists():
        return None
    if not path.is_dir():
        raise UserError(f"run directory {path} is a file")
    status = read_status(path).get("status")
    if status is None and any(path.iterdir()):
        raise UserError(f"{path} is not empty and holds no run: choose another run.dir")
    if status == "finished":
        raise UserError(f"{path} holds a finished run: choose another run.name or run.dir")
    if status == "unfinished" and resume == "never":
        raise UserError(f"{path} holds an unfinished run and resume=never")
    return RunDirectory(path, newest_valid_checkpoint(path / "checkpoints"))


def _job_name(parent: Path) -> str | None:
    """A name that stays the same when SLURM requeues a job; None elsewhere."""
    if "SLURM_STEP_ID" not in os.environ or "SLURM_JOB_ID" not in os.environ:
        return None
    name = f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_STEP_ID']}"
    finished = read_status(parent / name).get("status") == "finished"
    return None if finished else name  # several runs one after another in one step


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
