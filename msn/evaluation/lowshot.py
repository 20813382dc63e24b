"""From backbones and labelled images to rows: the one function that commands and training call."""

from collections.abc import Sequence
from pathlib import Path

import torch

from msn.data.workers import in_one_line
from msn.evaluation.backbones import FrozenBackbone, Subject
from msn.evaluation.cache import weights_key
from msn.evaluation.features import LabelledSet, Runtime, less_memory
from msn.evaluation.imagenet import is_imagenet, paper_figure
from msn.evaluation.protocol import Protocol
from msn.evaluation.sets import Result, check_labelled

PIXELS = "pixels"


def evaluate(
    protocol: Protocol,
    subjects: Sequence[Subject],
    train: LabelledSet,
    held_out: LabelledSet,
    *,
    num_workers: int,
    device: torch.device | tuple[torch.device, ...],
    cache_dir: Path | None = None,
    shared: bool = False,
) -> list[Result]:
    """Run a protocol on every backbone, with the same labelled images for all.

    Args:
        protocol: which images are labelled and what is fitted.
        subjects: what `open_backbones` gives, and baselines.
        train: labelled pool.
        held_out: images that test; nothing is chosen on them.
        num_workers: processes that decode, for each device.
        device: one or several; the first fits classifiers.
        cache_dir: where features are kept between calls; None keeps none.
        shared: whether every process of the default group makes this call, to share the
            extraction. All get the same results then; one should write them.

    Returns:
        Rows of `lowshot.json`, with fitted heads.

    Raises:
        UserError: the images, a backbone and the protocol do not fit each other.
    """
    check_labelled(train, held_out)
    devices = device if isinstance(device, tuple) else (device,)
    runtime = Runtime(devices, num_workers, cache_dir, shared)
    plan = protocol.plan(train)
    comparable = protocol.is_the_papers and is_imagenet(train.classes)
    batch_size = protocol.features.batch_size
    results = []
    for subject in subjects:
        with in_one_line(lambda: less_memory("protocol.features.batch_size", batch_size)):
            found = protocol.run(subject, plan, held_out, runtime)
        _say_what(found, subject)
        _set_beside_paper(found, subject if comparable else None)
        results += found
    return results


def _say_what(results: Sequence[Result], subject: Subject) -> None:
    """Add which weights the figures are of, and at which size."""
    if isinstance(subject, FrozenBackbone):
        digest = weights_key(subject.trunk)
        for result in results:
            result.row.update(weights=digest, image_size=subject.image_size)


def _set_beside_paper(results: Sequence[Result], subject: Subject | None) -> None:
    """Add the paper's figure for an architecture of the paper; None where nothing compares."""
    for result in results:
        figure = None
        if isinstance(subject, FrozenBackbone) and not subject.is_baseline:
            classifier, labels = result.row["classifier"], result.row["labels"]
            figure = paper_figure(subject.trunk.model_config, classifier, labels)
        result.row["paper"] = None if figure is None else figure._asdict()
