"""One directory a run: which one, whether it may be used, and what it says of itself."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from msn.errors import UserError
from msn.training.checkpointing import newest_valid_checkpoint
from msn.training.durable import write_durably

STATUS_FILE = "run.json"
# Processes that the trainer starts itself inherit the directory that the first one chose.
ENVIRONMENT = "MSN_RUN_DIRECTORY"


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes; nothing exists before `create`."""

    path: Path
    resume_from: Path | None
    """Checkpoint of an unfinished run that stands there."""
    is_new: bool = False
    """Whether the directory must not be there yet."""

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.path / "checkpoints"

    def create(self, config: DictConfig) -> None:
        """Make the directory and save the resolved configuration.

        Raises:
            UserError: if another run has taken the number in the meantime.
            OSError: if it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=not self.is_new)
        except FileExistsError:
            raise UserError(
                f"{self.path} was taken by a run that started just now: try again"
            ) from None
        text = OmegaConf.to_yaml(config, resolve=True)
        write_durably(self.path / "config.yaml", lambda file: file.write(text.encode()))
        self.write_status("unfinished")

    def write_status(self, status: str, **more: Any) -> None:
        """Keep "unfinished" or "finished" and further facts of the run in run.json."""
        facts = {**read_status(self.path), "status": status, **more}
        text = json.dumps(facts, indent=1)
        write_durably(self.path / STATUS_FILE, lambda file: file.write(text.encode()))


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
    parent = Path(config.run.root) / config.run.experiment
    name = config.run.name if config.run.name is not None else _job_name(parent)
    if config.run.dir is None and name is None:
        run = RunDirectory(_new_number(parent), None, is_new=True)
    else:
        path = Path(config.run.dir) if config.run.dir is not None else parent / name
        run = _existing(path, str(config.resume.mode)) or RunDirectory(path, None)
    _check_writable(run.path)
    resume_from = None if run.resume_from is None else str(run.resume_from.absolute())
    os.environ[ENVIRONMENT] = json.dumps([str(run.path.absolute()), resume_from])
    return run


def is_inherited() -> bool:
    """Whether the trainer of another process has started this one."""
    return ENVIRONMENT in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def read_status(path: Path) -> dict[str, Any]:
    """What run.json of a run directory says, empty where there is none."""
    file = path / STATUS_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


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
