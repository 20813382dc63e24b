"""`python -m msn export checkpoint=PATH format=... out=DIR`: write a backbone for a library."""

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from msn.commands.entry import to_plain
from msn.errors import UserError
from msn.schema import check_switch
from msn.weights.classifier import read_classifier
from msn.weights.export import check_format, export
from msn.weights.hub import check_push, push
from msn.weights.reading import newest_valid_checkpoint, read_weights
from msn.weights.weights import check_heads, say_notes


def run(config: DictConfig) -> None:
    """Export, and print what was compared and where the export is.

    Raises:
        UserError: see `msn.weights.export.export`.
    """
    settings = to_plain(config)
    checkpoint, out = Path(str(settings["checkpoint"])), Path(str(settings["out"]))
    check_format(settings["format"], has_head=settings["head"] is not None)
    for name in ("overwrite", "private"):
        check_switch(name, settings[name])
    repository = None if settings["push"] is None else check_push(settings["push"])
    weights = read_weights(
        _source(checkpoint, settings["format"]),
        num_heads=settings["model"]["num_heads"],
        key=settings["init_key"],
        family=settings["init_family"],
    )
    if settings["format"] == "huggingface" and weights.meta.get("kind") == "mae":
        # The backbone of a run is the encoder alone; its newest checkpoint has the decoder.
        newest = newest_valid_checkpoint(checkpoint / "checkpoints")
        weights = weights if newest is None else read_weights(newest)
    check_heads(weights, settings["model"]["num_heads"], str(checkpoint))
    run_dir = _run_directory(checkpoint)
    if run_dir is not None:
        weights.meta["config_digest"] = _digest(run_dir / "config.yaml")
    head = settings["head"]
    report = export(
        weights,
        format=settings["format"],
        out=out,
        image_size=settings["image_size"],
        head=None if head is None else read_classifier(head, int(weights.model["embed_dim"])),
        overwrite=settings["overwrite"],
        lowshot=_lowshot(run_dir),
        model_type=settings["model_type"],
    )
    say_notes(weights, str(checkpoint))
    print(
        f"{report['compared']} equal to {report['checked_with']}: max difference "
        f"{report['max_abs_difference']:.1e} (allowed {report['tolerance']:.0e})"
    )
    print(f"exported to: {out}")
    if repository is not None:
        print(f"pushed to: {push(out, repository, private=settings['private'])}")


def _source(checkpoint: Path, format: str) -> Path:
    """What to read: for the released layout the newest checkpoint of a run.

    It has anchor, head and prototypes, which the run's backbone file lacks.
    """
    if format != "official":
        return checkpoint
    return newest_valid_checkpoint(checkpoint / "checkpoints") or checkpoint


def _run_directory(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to, None if it belongs to none."""
    places = [checkpoint] if checkpoint.is_dir() else [checkpoint.parent]
    if places[0].name == "checkpoints":
        places.append(places[0].parent)
    return next((place for place in places if (place / "config.yaml").is_file()), None)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _lowshot(run_dir: Path | None) -> list[dict[str, Any]] | None:
    path = None if run_dir is None else run_dir / "lowshot.json"
    if path is None or not path.is_file():
        return None
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r})") from error
    return rows
