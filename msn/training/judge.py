"""The verdict after each epoch: is the run learning? Rules with stated thresholds.

The rules are pure functions of rows of `msn.training.monitors`; docs/monitoring.md says where the
thresholds come from. The callback writes verdicts to the run directory and may end the run.
Legend: K prototypes.
"""

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from msn.errors import UserError
from msn.files import read_rows, write_atomically
from msn.method.schedules import warmup_length
from msn.training.base import PretrainingModule
from msn.training.module import MSNModule
from msn.training.monitors import Monitors
from msn.training.probe import Probe
from msn.training.trainer import callbacks_of

Row = Mapping[str, float]

# Only divergence is judged before so many steps and epochs and before a tenth of the warm-up, as
# every run starts with few effective directions.
PATIENCE_STEPS, PATIENCE_EPOCHS, PATIENCE_WARMUP = 60, 2, 0.1
# Cross-entropy as a share of log K, which is that of predictions that know nothing.
DIVERGED = 1.0
# Effective number of prototypes that targets use, as a share of what the prior would use: collapsed
# at once; collapsed if the anchors' mean prediction has lost its entropy (share of log K) as well;
# collapsed if it stays. Runs without Sinkhorn may start with few prototypes and recover.
COLLAPSED_AT_ONCE, COLLAPSED, COLLAPSED_ENTROPY = 0.03, 0.1, 0.5
COLLAPSED_IF_STAYS_EPOCHS, COLLAPSED_IF_STAYS_SHARE = 10, 0.2  # of the training
# Spread of unit-length features: 1 if they cover all directions, 0 if all point one way.
COLLAPSED_SPREAD = 0.02
# Mean entropy of targets as a share of log K.
UNIFORM_ENTROPY = 0.95
# Agreement of every kind of anchor view with its target: at any time, or in the first judged epoch
# of a network that started from scratch. With a smaller share of prototypes in use than
# TOO_ALIKE_PERPLEXITY, agreement says little about views.
TOO_ALIKE, TOO_ALIKE_AT_FIRST, TOO_ALIKE_PERPLEXITY = 0.97, 0.5, 0.5
# Cross-entropy above the targets' own entropy, as a share of log K.
AT_FLOOR = 0.02
# MAE: error on masked patches over that of predicting each patch's mean.
MAE_DIVERGED, MEANS_ONLY = 1.2, 0.97
# For a run that started from weights, against the probe before its first step: loss of 10-NN
# accuracy (at least two standard errors of the difference), or share of the effective rank.
FORGOTTEN_KNN, FORGOTTEN_RANK = 0.02, 0.7
# Share of the time that steps wait for data.
DATA_BOUND = 0.5


class Facts(NamedTuple):
    """Settings of an MSN run that the rules read."""

    num_prototypes: int  # K
    prior_perplexity: float  # exp(entropy) of the prior over prototypes: K if it is uniform
    width: int  # of the features
    warmup_epochs: float
    use_sinkhorn: bool
    me_max_weight: float
    lr: float  # peak
    epochs: int  # of the whole training
    from_scratch: bool  # whether training started from random weights


class MAEFacts(NamedTuple):
    """Settings of an MAE run that the rules read."""

    width: int  # of the features
    warmup_epochs: float
    lr: float  # peak


class Verdict(NamedTuple):
    """The judgement of an epoch."""

    kind: str  # one of `KINDS`
    line: str  # for a person: the finding, and what to do about it

    @property
    def is_failure(self) -> bool:
        """Whether the run will not learn as it is set."""
        return self.kind in FAILURES


NOT_ABOVE = "learning, not above floors"
FAILURES = ("diverged", "collapsed", "features collapsed", "uniform")
KINDS = (
    *FAILURES,
    "views too alike",
    "few prototypes",
    "means only",
    "forgetting",
    "warming up",
    "loss at its floor",
    "learning",
    NOT_ABOVE,
)


def judge(
    rows: Sequence[Row], facts: Facts, *, epoch: int, step: int, first_agreement: float | None
) -> Verdict:
    """Judge an epoch.

    Args:
        rows: monitors of the epoch, oldest first, at least one.
        facts: of the run.
        epoch: finished epochs, this one among them.
        step: optimiser steps taken.
        first_agreement: `agreement` of the first epoch that was judged; None if it is this one.
    """
    row = mean_row(rows)
    verdict = _early(rows, facts, epoch, step)
    if verdict is None:
        first = agreement(row, facts) if first_agreement is None else first_agreement
        verdict = (
            _collapsed(row, facts, epoch)
            or _diverged(row, facts)
            or _uniform(row, facts)
            or _too_alike(row, facts, first)
            or _at_floor(row, facts)
            or Verdict("learning", f"learning: {_figures(row, facts)}")
        )
    return verdict._replace(line=verdict.line + _data_bound(row))


def judge_mae(rows: Sequence[Row], facts: MAEFacts, *, epoch: int, step: int) -> Verdict:
    """Judge an epoch of MAE; arguments as of `judge`."""
    row = mean_row(rows)
    loss, of_means = row["train/loss"], row["reconstruction/error_of_means"]
    told = f"error on masked patches {loss:.3f} where means alone give {of_means:.3f}"
    rank = f"effective rank {row['features/rankme']:.1f} of {facts.width}"
    if early := _early(rows, facts, epoch, step):
        verdict = early
    elif loss >= MAE_DIVERGED * of_means:
        verdict = Verdict("diverged", f"diverged: {told}; {_slower(facts)}")
    elif loss >= MEANS_ONLY * of_means:
        verdict = Verdict(
            "means only",
            f"reconstructs the mean only: {told}; train longer, raise method.lr (now "
            f"{facts.lr:g}) or lower method.mask_ratio",
        )
    else:
        verdict = Verdict("learning", f"learning: {told}, {rank}")
    return verdict._replace(line=verdict.line + _data_bound(row))


def _early(rows: Sequence[Row], facts: Facts | MAEFacts, epoch: int, step: int) -> Verdict | None:
    """The verdict on numbers that are not finite, or on the first steps."""
    names = ("train/loss", "train/grad_norm")
    if not all(math.isfinite(row[name]) for row in rows for name in names if name in row):
        line = f"diverged: loss or gradient is not a finite number; {_slower(facts)}"
        return Verdict("diverged", line)
    if is_patient(facts, epoch, step):
        return Verdict("warming up", "warming up: too early to tell")
    return None


def forgetting(start: Row, now: Row, *, held_out: int) -> Verdict | None:
    """The verdict if features are worse than before training.

    Args:
        start: the probe before the first step.
        now: the probe of this epoch.
        held_out: number of images that the probe classifies.
    """
    lost = []
    if "probe/knn_top1" in start:
        before, after = start["probe/knn_top1"], now["probe/knn_top1"]
        error = math.sqrt((before * (1 - before) + after * (1 - after)) / held_out)
        if before - after > max(FORGOTTEN_KNN, 2 * error):
            lost.append(f"10-NN {after:.1%}, at the start {before:.1%}")
    before, after = start["probe/rankme"], now["probe/rankme"]
    if not after >= FORGOTTEN_RANK * before:
        lost.append(f"effective rank {after:.1f}, at the start {before:.1f}")
    if not lost:
        return None
    remedy = (
        "lower method.trunk_lr_scale or method.layer_decay, raise method.momentum, lengthen "
        "method.freeze_epochs, or train for fewer epochs (experiment=adapt sets all of them)"
    )
    return Verdict("forgetting", f"forgetting: {'; '.join(lost)}; {remedy}")


def is_patient(facts: Facts | MAEFacts, epoch: int, step: int) -> bool:
    """Whether it is too early for any verdict except divergence."""
    epochs = max(PATIENCE_EPOCHS, PATIENCE_WARMUP * facts.warmup_epochs)
    return epoch < epochs or step < PATIENCE_STEPS


def mean_row(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of each figure over the rows that have it."""
    names = {name for row in rows for name in row}
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def agreement(row: Row, facts: Facts) -> float:
    """Share of anchors with their target's strongest prototype, for the kind that agrees less.

    0 if few prototypes are in use, as agreement then says nothing about the views.
    """
    if row["collapse/prototype_perplexity"] < TOO_ALIKE_PERPLEXITY * facts.prior_perplexity:
        return 0.0
    return min(row[f"collapse/agreement_{kind}"] for kind in _anchor_kinds(row))


def _slower(facts: Facts | MAEFacts) -> str:
    return f"lower method.lr (now {facts.lr:g}) or lengthen method.warmup_epochs"


def _diverged(row: Row, facts: Facts) -> Verdict | None:
    uniform, found = math.log(facts.num_prototypes), row["train/cross_entropy"]
    if found < DIVERGED * uniform:
        return None
    return Verdict(
        "diverged",
        f"diverged: cross-entropy {found:.3f} is not below log K = {uniform:.3f}, that of "
        f"predictions that know nothing; {_slower(facts)}",
    )


def _collapsed(row: Row, facts: Facts, epoch: int) -> Verdict | None:
    share = row["collapse/prototype_perplexity"] / facts.prior_perplexity
    stays = epoch >= max(COLLAPSED_IF_STAYS_EPOCHS, COLLAPSED_IF_STAYS_SHARE * facts.epochs)
    lost = row["collapse/mean_prediction_entropy"] < COLLAPSED_ENTROPY
    if share < COLLAPSED:
        used = f"{max(1, round(row['collapse/prototype_perplexity'])):,}"
        remedies = [f"raise method.me_max_weight (now {facts.me_max_weight:g})"]
        remedies += [] if facts.use_sinkhorn else ["set method.use_sinkhorn=true"]
        remedy = " or ".join(remedies)
        if share < COLLAPSED_AT_ONCE or stays or lost:
            line = f"collapsed to {used} of {facts.num_prototypes:,} prototypes: {remedy}"
            return Verdict("collapsed", line)
        return Verdict(
            "few prototypes",
            f"few prototypes: targets use {used} of {facts.num_prototypes:,}, which may pass; "
            f"if it does not, {remedy}",
        )
    if row["features/std"] < COLLAPSED_SPREAD:
        return Verdict(
            "features collapsed",
            "features collapsed: all images look alike (effective rank "
            f"{row['features/rankme']:.1f} of {facts.width}): lower method.lr (now {facts.lr:g}), "
            "slow the target (raise method.momentum), or let data.views differ less",
        )
    return None


def _uniform(row: Row, facts: Facts) -> Verdict | None:
    share = row["train/cross_entropy_floor"] / math.log(facts.num_prototypes)
    if share <= UNIFORM_ENTROPY:
        return None
    return Verdict(
        "uniform",
        f"uniform assignments: targets carry {share:.0%} of the greatest entropy, so there is "
        "nothing to match; sharpen the targets (lower method.temperature or "
        "method.sharpen_temperature)",
    )


def _too_alike(row: Row, facts: Facts, first: float) -> Verdict | None:
    remedy = "widen data.views (crop scales, colour) or raise method.patch_drop"
    now = agreement(row, facts)
    if now >= TOO_ALIKE:
        return Verdict(
            "views too alike",
            f"views too alike: anchors match their targets in {now:.0%} of cases, so that nothing "
            f"is left to learn; {remedy}",
        )
    if facts.from_scratch and first >= TOO_ALIKE_AT_FIRST:
        return Verdict(
            "views too alike",
            f"views too alike: anchors matched their targets in {first:.0%} of cases when little "
            f"was learnt yet (now {now:.0%}), so that matching teaches little; {remedy}",
        )
    return None


def _at_floor(row: Row, facts: Facts) -> Verdict | None:
    floor = row["train/cross_entropy_floor"]
    above = row["train/cross_entropy"] - floor
    if above > AT_FLOOR * math.log(facts.num_prototypes):
        return None
    return Verdict(
        "loss at its floor",
        f"loss at its floor: cross-entropy is {above:.2f} above the targets' own entropy "
        f"{floor:.2f}, which it cannot pass; watch probe and rank instead. {_figures(row, facts)}",
    )


def _figures(row: Row, facts: Facts) -> str:
    agreeing = " / ".join(
        f"{row[f'collapse/agreement_{kind}']:.0%} ({kind})" for kind in _anchor_kinds(row)
    )
    return (
        f"views agree {agreeing}, {row['collapse/prototypes_used']:.0f} of "
        f"{facts.num_prototypes:,} prototypes used, effective rank "
        f"{row['features/rankme']:.1f} of {facts.width}"
    )


def _data_bound(row: Row) -> str:
    wait = row.get("speed/data_wait", 0.0)
    if wait < DATA_BOUND:
        return ""
    return f"; data-bound: {wait:.0%} waiting (raise data.num_workers or make shards)"


def _anchor_kinds(row: Row) -> list[str]:
    return [kind for kind in ("rand", "focal") if f"collapse/agreement_{kind}" in row]


log = logging.getLogger(__name__)

VERDICTS_FILE = "verdicts.csv"
PRAISE = ("learning", "loss at its floor")
_COLUMNS = ("step", "epoch", "verdict", "line")
# Epochs in a row that must end in a failure before a run is stopped.
STOP_AFTER = 2


class Judge(Callback):
    """Judge each epoch by its monitors; `msn.training.progress` prints the verdict.

    Args:
        directory: of the run, for verdicts.csv.
        on_collapse: `warn`, or `stop`: two failed epochs in a row end the run.

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
        """Drop verdicts on epochs that a resumed run repeats."""
        assert isinstance(pl_module, PretrainingModule)
        self._facts = facts_of(pl_module, epochs=trainer.max_epochs or 0)
        if trainer.is_global_zero:
            kept = read_verdicts(self._path)
            self._rows = [row for row in kept if int(row["step"]) <= trainer.global_step]
            self._write()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        rows = callbacks_of(trainer, Monitors)[0].rows
        if not rows:  # resumed at the very end of an epoch
            return
        epoch, step = trainer.current_epoch + 1, trainer.global_step
        self.latest = self._judged(rows, epoch, step)
        if not self.latest.is_failure:
            self.latest = self._forgotten(trainer) or self.latest
        if trainer.is_global_zero:
            values = (str(step), str(epoch), self.latest.kind, self.latest.line)
            self._rows.append(dict(zip(_COLUMNS, values, strict=True)))
            self._write()
        self._failures = self._failures + 1 if self.latest.is_failure else 0
        # All processes have the same rows, so all of them stop.
        if self._stops and self._failures >= STOP_AFTER:
            raise UserError(
                f"stopped after epoch {epoch} (on_collapse=stop): {self.latest.line}; "
                f"its record is in {self._path.parent}"
            )

    def _forgotten(self, trainer: Trainer) -> Verdict | None:
        for probe in callbacks_of(trainer, Probe):
            if probe.start and probe.latest_epoch == trainer.current_epoch:
                return forgetting(probe.start, probe.latest, held_out=probe.num_held_out)
        return None

    def _judged(self, rows: Sequence[Row], epoch: int, step: int) -> Verdict:
        facts, first = self._facts, self._first_agreement
        if isinstance(facts, MAEFacts):
            return judge_mae(rows, facts, epoch=epoch, step=step)
        if first is None and not is_patient(facts, epoch, step):
            self._first_agreement = agreement(mean_row(rows), facts)
        return judge(rows, facts, epoch=epoch, step=step, first_agreement=first)

    def _write(self) -> None:
        """Write all verdicts; on a full disk training goes on, and the next epoch tries again."""
        try:
            _write_verdicts(self._path, self._rows)
        except OSError as error:
            why = error.strerror or error
            log.error("%s cannot be written: %s; training goes on", self._path, why)

    def state_dict(self) -> dict[str, Any]:
        """Failures in a row, and the agreement of views when first judged."""
        return {"failures": self._failures, "first_agreement": self._first_agreement}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._failures = int(state_dict["failures"])
        self._first_agreement = state_dict["first_agreement"]


def facts_of(module: PretrainingModule, *, epochs: int) -> Facts | MAEFacts:
    """Collect the settings that the rules read."""
    method, width = module.settings["method"], int(module.settings["model"]["embed_dim"])
    warmup_epochs, lr = warmup_length(method["warmup_epochs"], epochs), float(method["lr"])
    if not isinstance(module, MSNModule):
        return MAEFacts(width=width, warmup_epochs=warmup_epochs, lr=lr)
    prior, perplexity = module.loss.log_prior, float(method["num_prototypes"])
    if prior is not None:
        perplexity = float((-(prior.exp() * prior).sum()).exp())
    return Facts(
        num_prototypes=int(method["num_prototypes"]),
        prior_perplexity=perplexity,
        width=width,
        warmup_epochs=warmup_epochs,
        use_sinkhorn=bool(method["use_sinkhorn"]),
        me_max_weight=float(method["me_max_weight"]),
        lr=lr,
        epochs=epochs,
        from_scratch=module.checkpoint_info.get("init") is None,
    )


def read_verdicts(path: Path) -> list[dict[str, str]]:
    """Rows of a verdicts.csv: step, epoch, verdict, line; none if there is no file."""
    return read_rows(path, text=("verdict", "line"))


def add_to_verdict(directory: Path, line: str, *, kind: str | None) -> dict[str, str] | None:
    """Correct the last verdict of a run by its low-shot table, if that verdict is praise.

    Args:
        directory: of the run.
        line: added to that of the verdict.
        kind: the new verdict; None keeps it.

    Returns:
        The changed verdict, or None.

    Raises:
        OSError: if it cannot be written.
    """
    rows = read_verdicts(directory / VERDICTS_FILE)
    if not rows or rows[-1]["verdict"] not in PRAISE:
        return None
    last = rows[-1]
    last["line"] = f"{last['line']}; but {line}"
    last["verdict"] = kind or last["verdict"]
    _write_verdicts(directory / VERDICTS_FILE, rows)
    return last


def _write_verdicts(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
