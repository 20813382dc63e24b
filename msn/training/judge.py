"""The verdict at every epoch's end: kept in the run directory, and at wish the end of the run."""

import csv
import io
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from msn.errors import UserError
from msn.files import read_rows, write_atomically
from msn.training.module import MSNModule
from msn.training.monitors import Monitors
from msn.training.verdict import Facts, Verdict, agreement, is_patient, judge, mean_row

log = logging.getLogger(__name__)

VERDICTS_FILE = "verdicts.csv"
_COLUMNS = ("step", "epoch", "verdict", "line")
# Epochs in a row that must end in a failure before a run is stopped.
STOP_AFTER = 2


class Judge(Callback):
    """Turn the monitors of each epoch into a line; `msn.training.progress` prints it.

    Args:
        directory: of the run; verdicts.csv is kept there.
        on_collapse: `warn`, or `stop`: two epochs in a row that end as a failure end the run.

    Attributes:
        latest: the last verdict.

    Raises:
        UserError: if `on_collapse` is neither; at an epoch's end, if the run is to stop.
    """

    def __init__(self, *, directory: str | Path, on_collapse: str) -> None:
        if on_collapse not in ("warn", "stop"):
            raise UserError(f"on_collapse must be warn or stop, got {on_collapse}")
        self.latest: Verdict | None = None
        self._path = Path(directory) / VERDICTS_FILE
        self._stops = on_collapse == "stop"
        self._failures = 0
        self._first_agreement: float | None = None
        self._rows: list[dict[str, str]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget verdicts on epochs that a resumed run takes again."""
        assert isinstance(pl_module, MSNModule)
        self._facts = facts_of(pl_module, epochs=trainer.max_epochs or 0)
        if trainer.is_global_zero:
            kept = read_verdicts(self._path)
            self._rows = [row for row in kept if int(row["step"]) <= trainer.global_step]
            self._write()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        rows = next(c.rows for c in trainer.callbacks if isinstance(c, Monitors))  # type: ignore[attr-defined]
        if not rows:  # resumed at the very end of an epoch
            return
        epoch, step = trainer.current_epoch + 1, trainer.global_step
        self.latest = judge(
            rows, self._facts, epoch=epoch, step=step, first_agreement=self._first_agreement
        )
        if self._first_agreement is None and not is_patient(self._facts, epoch, step):
            self._first_agreement = agreement(mean_row(rows), self._facts)
        if trainer.is_global_zero:
            values = (str(step), str(epoch), self.latest.kind, self.latest.line)
            self._rows.append(dict(zip(_COLUMNS, values, strict=True)))
            self._write()
        self._failures = self._failures + 1 if self.latest.is_failure else 0
        # All processes have the same rows, so that all of them stop.
        if self._stops and self._failures >= STOP_AFTER:
            raise UserError(
                f"stopped after epoch {epoch} (on_collapse=stop): {self.latest.line}; "
                f"its record is in {self._path.parent}"
            )

    def _write(self) -> None:
        """Write all verdicts; on a full disk training goes on, the next epoch tries again."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self._rows)
        try:
            write_atomically(self._path, lambda file: file.write(text.getvalue().encode()))
        except OSError as error:
            log.error(
                "%s cannot be written: %s; training goes on", self._path, error.strerror or error
            )

    def state_dict(self) -> dict[str, Any]:
        """Failures in a row so far, and how views agreed when they were first judged."""
        return {"failures": self._failures, "first_agreement": self._first_agreement}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the checkpoint was written."""
        self._failures = int(state_dict["failures"])
        self._first_agreement = state_dict["first_agreement"]


def facts_of(module: MSNModule, *, epochs: int) -> Facts:
    """What the rules must know of a run."""
    method = module.settings["method"]
    prior = module.loss.log_prior
    num_prototypes = int(method["num_prototypes"])
    return Facts(
        num_prototypes=num_prototypes,
        prior_perplexity=num_prototypes
        if prior is None
        else float((-(prior.exp() * prior).sum()).exp()),
        width=int(module.settings["model"]["embed_dim"]),
        warmup_epochs=float(method["warmup_epochs"]),
        use_sinkhorn=bool(method["use_sinkhorn"]),
        me_max_weight=float(method["me_max_weight"]),
        lr=float(method["lr"]),
        epochs=epochs,
        from_scratch=module.checkpoint_info.get("init") is None,
    )


def read_verdicts(path: Path) -> list[dict[str, str]]:
    """Rows of a verdicts.csv: step, epoch, verdict, line; none where there is no file."""
    return read_rows(path, text=("verdict", "line"))
