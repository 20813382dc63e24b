"""Finish a run: write the backbone, the low-shot table and the report."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer

from msn.commands.adaptation import better_of, describe, foundation_beside
from msn.commands.eval_lowshot import baselines, check_baselines, write_table
from msn.commands.report import REPORT_FILE, open_run, write_report
from msn.commands.run_directory import RunDirectory
from msn.data.datamodule import MSNDataModule
from msn.evaluation.backbones import FrozenBackbone
from msn.evaluation.features import Runtime
from msn.evaluation.lowshot import Protocol, evaluate
from msn.evaluation.sets import Row
from msn.schema import as_argument
from msn.training.base import PretrainingModule
from msn.training.judge import NOT_ABOVE, add_to_verdict
from msn.training.loggers import TensorBoardRun, WandbRun
from msn.weights import save_backbone
from msn.weights.card import floors_note
from msn.weights.weights import BACKBONE_FILE, MAJORITY, PIXELS, RANDOM

log = logging.getLogger(__name__)

REPORT_IMAGES = 500  # training images that the report's pictures look at


def finish(
    settings: dict[str, Any],
    directory: RunDirectory,
    trainer: Trainer,
    data: MSNDataModule,
    module: PretrainingModule,
    protocol: Protocol,
) -> None:
    """Export the backbone, evaluate it if there are labels, mark the run as finished.

    Every process makes this call and extracts its share of the features; the first one writes.

    Raises:
        OSError: if a file cannot be written.
    """
    module.network.backbone.eval()
    first = trainer.is_global_zero
    # After a fit Lightning has moved the module to the CPU; the device is free for the evaluation.
    device = trainer.strategy.root_device
    labelled, subjects = data.labelled_sets(), [evaluated(module, protocol)]
    kept, meta, facts = subjects[0], _meta(module), {}
    if settings["keep_better"]:
        subjects = list(foundation_beside(kept, settings))
        runtime = Runtime((device,), data.num_workers, None, trainer.world_size > 1)
        pool = None if labelled is None else labelled[0]
        kept, facts["kept"] = better_of(subjects, pool, protocol.features, runtime)
        meta |= describe(kept)
    if first:
        save_backbone(directory.path / BACKBONE_FILE, kept.trunk.state_dict(), meta)
    if labelled is None and first:
        print(f"no labels: no low-shot table ({data.pools.why})")
    if labelled is not None:
        wanted = check_baselines(settings["baselines"], protocol)
        results = evaluate(
            protocol,
            [*subjects, *baselines(wanted, subjects[-1], settings["seed"])],
            *labelled,
            num_workers=data.num_workers,
            device=device,
            shared=trainer.world_size > 1,
            majority=MAJORITY in wanted,
        )
        if first:
            write_table(directory.path, results, labelled, settings)
            _judge_by_table(directory, [result.row for result in results])
    if not first:
        return
    for fact, line in facts.items():
        print(f"{fact}: {line}")
    directory.write_status("finished", **facts)
    if settings["report"]:
        _report(directory, device)
    _log_results(trainer)
    print(f"run directory: {directory.path}")


def evaluated(module: PretrainingModule, protocol: Protocol) -> FrozenBackbone:
    """The trained trunk, as it is evaluated for the table.

    Raises:
        UserError: if it has no such feature, or its patch does not divide the images.
    """
    trunk = module.network.backbone
    image_size = protocol.features.image_size or trunk.img_size
    backbone = FrozenBackbone(module.name, trunk, image_size)
    protocol.check_backbone(backbone)
    return backbone


def _judge_by_table(directory: RunDirectory, rows: Sequence[Row]) -> None:
    """Correct the verdict "learning" if the table shows a backbone that beats no baseline.

    It changes if no column is above a random network, or none above raw pixels. If some are, its
    line says which are not.
    """
    for line in floors_note(rows, (RANDOM, PIXELS)):
        own = [row["above"] for row in rows if row.get("above")]
        nowhere = any(
            all(above[floor]["interval"][0] <= 0 for above in own if floor in above)
            for floor in (RANDOM, PIXELS)
            if any(floor in above for above in own)
        )
        verdict = add_to_verdict(directory.path, line, kind=NOT_ABOVE if nowhere else None)
        if verdict is not None:
            print(f"verdict: {verdict['line']}")


def _report(directory: RunDirectory, device: torch.device) -> None:
    """Build report.html; an error in it does not end the run, which is complete without it."""
    try:
        record = open_run(directory.path, directory.path.absolute().name)
        path = directory.path / REPORT_FILE
        write_report([record], path, images=REPORT_IMAGES, device=device)
    except Exception:
        argument = as_argument("runs", directory.path)
        log.exception("no report: python -m msn report %s tries again", argument)
    else:
        print(f"report: {path}")


def _meta(module: PretrainingModule) -> dict[str, Any]:
    kind = module.description.get("kind")
    return {
        **({} if kind is None else {"kind": kind}),
        "model": dict(module.settings["model"]),
        "method": module.settings["method"],
        "epoch": module.finished_epochs,
        **module.checkpoint_info,
    }


def _log_results(trainer: Trainer) -> None:
    """Pass tables and artifacts to the loggers that take them."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbRun | TensorBoardRun):
            logger.log_results()
