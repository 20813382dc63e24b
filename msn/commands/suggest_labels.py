"""`python -m msn suggest_labels checkpoint=... budget=N out=DIR`: which images to label first."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from msn.commands.entry import to_plain
from msn.commands.eval_lowshot import cache_directory, choose_device, without_views
from msn.commands.show_views import write_picture
from msn.data.datamodule import resolve_workers
from msn.data.dataset import LabelledImages, Subset
from msn.data.hf import SAVED
from msn.data.pools import PoolSettings, build_pools
from msn.data.sources import FileSource
from msn.data.subsets import write_names
from msn.data.workers import in_one_line, less_memory
from msn.errors import UserError
from msn.evaluation.backbones import FrozenBackbone, open_backbones
from msn.evaluation.features import FeatureSettings, Runtime
from msn.evaluation.frozen import Logistic, logistic_results
from msn.evaluation.label_choice import METHODS, Choice, contact_sheet, cover_prototypes, k_medoids
from msn.evaluation.sets import (
    FeatureSet,
    LabelSet,
    Trial,
    UnlabelledImages,
    held_out_features,
    open_image,
)
from msn.files import placed_at, write_bytes
from msn.images.depth import check_depth, trained_depth
from msn.method.vit import VisionTransformer
from msn.schema import as_argument, make, whole_number
from msn.weights import ForeignBackbone, Weights, open_backbone_of
from msn.weights.reading import newest_valid_checkpoint
from msn.weights.weights import prototype_cosines

NAMES_FILE, TABLE_FILE, SHEET_FILE = "suggested.txt", "suggested.csv", "contact_sheet.png"
COPIES = "images"
_SHEET_IMAGES = 200
_TRIES = 20


def run(config: DictConfig) -> None:
    """Choose images, write a table and a contact sheet, compare with random choices if possible.

    Args:
        config: `checkpoint`, `data` (of `PoolSettings`), `budget`, `choose`, `out`,
            `features` (of `FeatureSettings`), `logistic` (of `frozen.Logistic`), `compare_seeds`,
            `device`, `cache_dir`, `model.num_heads`, `init_key`, `init_family`.

    Raises:
        UserError: if a setting, a path or a file is wrong.
    """
    settings = to_plain(without_views(config))
    out = Path(str(settings["out"])).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: exists and is not an empty directory")
    method, budget = settings["choose"], whole_number("budget", settings["budget"], 1)
    if method not in METHODS:
        raise UserError(f"choose={method}: must be one of {', '.join(METHODS)}")
    data = make("data", images_of(settings["data"]), PoolSettings)
    told: dict[str, Any] = {
        "num_heads": settings["model"]["num_heads"],
        "key": settings["init_key"],
        "family": settings["init_family"],
    }
    size = settings["features"]["image_size"]
    (subject,) = open_backbones(settings["checkpoint"], image_size=size, **told)
    weights = None
    if method == "prototypes":
        weights = _with_prototypes(settings["checkpoint"], **told)
    data = replace(data, depth=trained_depth(check_depth(data.depth), [subject.about]))
    pools = build_pools(data)
    chooser = _Chooser(settings, subject, weights, pools.train)
    choice = chooser.choose(budget)
    _write(out, pools.train, choice)
    print(f"{budget} of {len(pools.train)} images to label: {out / TABLE_FILE}")
    print(f"contact sheet: {out / SHEET_FILE}")
    checkpoint = as_argument("checkpoint", settings["checkpoint"])
    table = as_argument("data.root", out / TABLE_FILE)
    print(f"fill in its column label, then: python eval_lowshot.py {checkpoint} data=list {table}")
    if not settings["compare_seeds"] or not data.use_labels:
        return
    if pools.labelled is None or pools.held_out is None:
        print(f"not compared with random choices, as there are no labels: {pools.why}")
    elif len(pools.labelled) < len(pools.train):
        print("not compared with random choices, as some images have no labels")
    else:
        held_out = LabelledImages(pools.held_out, "held-out")
        chooser.compare(choice, LabelledImages(pools.labelled, "training"), held_out)


def images_of(data: dict[str, Any]) -> dict[str, Any]:
    """The data as they are meant: a root without a kind is a folder, a list, or as `hf` has it."""
    if data["source"] not in ("digits", "folder") or data["root"] is None:
        return data
    root = Path(str(data["root"]))
    kind = "list" if root.is_file() else "folder"
    if root.suffix.lower() in (".parquet", ".arrow") or any(
        (root / name).is_file() for name in SAVED
    ):
        kind = "hf"
    return {**data, "source": kind, "image_size": None}


def _with_prototypes(checkpoint: str, **told: Any) -> Weights:
    """Weights with head and prototypes: of a run directory, the newest checkpoint.

    Raises:
        UserError: if there is no head or there are no prototypes.
    """
    path = newest_valid_checkpoint(Path(checkpoint) / "checkpoints") or checkpoint
    found = open_backbone_of(path, **told)
    if isinstance(found, ForeignBackbone) or found.head is None or found.prototypes is None:
        raise UserError(
            f"checkpoint={checkpoint}: has no head and prototypes, like any export; "
            "choose=medoids needs neither"
        )
    return found


class _Chooser:
    """Features of the pool, from which images are chosen."""

    def __init__(
        self,
        config: Mapping[str, Any],
        subject: FrozenBackbone,
        weights: Weights | None,
        pool: Subset,
    ) -> None:
        self.config, self.subject, self.weights, self.pool = config, subject, weights, pool
        self.settings = make("features", config["features"], FeatureSettings)
        subject.check(self.settings)
        device = choose_device(config["device"])
        workers = resolve_workers(config["data"]["num_workers"], in_memory=False)
        self.runtime = Runtime((device,), workers, cache_directory(config["cache_dir"]))
        images = UnlabelledImages(pool)
        with in_one_line(lambda: less_memory("features.batch_size", self.settings.batch_size)):
            self.features = subject.features(images, self.settings, self.runtime, "pool").rows
        self.cosines = self._cosines(images) if config["choose"] == "prototypes" else None

    def choose(self, budget: int) -> Choice:
        """Choose readable images; unreadable ones are replaced by others."""
        left = torch.arange(len(self.pool))
        for _ in range(_TRIES):
            choice = self._among(left, budget)
            bad = [i for i in choice.positions.tolist() if open_image(self.pool, i) is None]
            if not bad:
                return choice
            left = left[~torch.isin(left, torch.tensor(bad))]
        raise UserError(f"data: too many images cannot be read (last: {self.pool.name(bad[0])})")

    def compare(self, choice: Choice, train: LabelledImages, held_out: LabelledImages) -> None:
        """Print accuracy with the suggested images beside random choices of equal size."""
        seeds, budget = int(self.config["compare_seeds"]), len(choice.positions)
        random = [
            torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:budget]
            for seed in range(seeds)
        ]
        test = self.subject.features(held_out, self.settings, self.runtime, "held out")
        test_set = held_out_features(held_out, test)
        sets = [LabelSet("suggested", "suggested", choice.positions.sort().values)]
        sets += [LabelSet("random", f"seed {i}", r.sort().values) for i, r in enumerate(random)]
        trial = Trial(
            "msn",
            self.subject.kind(self.settings),
            sets,
            FeatureSet(self.features, train.labels, train.classes, groups=train.groups),
            test_set,
            self.runtime.devices[0],
        )
        results = logistic_results(trial, make("logistic", self.config["logistic"], Logistic))
        covered = {
            "suggested": [len(train.labels[choice.positions].unique())],
            "random": [len(train.labels[positions].unique()) for positions in random],
        }
        _print_comparison([result.row for result in results], covered, budget, len(train.classes))

    def _among(self, left: Tensor, budget: int) -> Choice:
        if self.cosines is None:
            choice = k_medoids(self.features[left], budget)
        else:
            choice = cover_prototypes(self.cosines[left], self.features[left], budget)
        return choice._replace(positions=left[choice.positions])

    def _cosines(self, images: UnlabelledImages) -> Tensor:
        """Cosines between every image's projection and the prototypes, [n, K]."""
        assert self.weights is not None
        return prototype_cosines(self.weights, self._normed_tokens(images))

    @property
    def _trunk(self) -> VisionTransformer:
        assert isinstance(self.subject.trunk, VisionTransformer)  # it has prototypes
        return self.subject.trunk

    def _normed_tokens(self, images: UnlabelledImages) -> Tensor:
        """Class tokens after the final norm, from the features if possible."""
        feature = self.subject.kind(self.settings)
        if feature == "class_token":
            return self._trunk.norm(self.features)
        if feature == "class_token_norm":
            return self.features
        normed = FeatureSettings(
            feature="class_token_norm",
            image_size=self.settings.image_size,
            batch_size=self.settings.batch_size,
            precision=self.settings.precision,
        )
        return self.subject.features(images, normed, self.runtime, "pool").rows


def _write(out: Path, pool: Subset, choice: Choice) -> None:
    """Write the table, which `data=list` reads from any directory, the names, and the sheet."""
    positions = choice.positions.tolist()
    shown = positions[:_SHEET_IMAGES]
    images = [open_image(pool, i) for i in shown]
    sheet = contact_sheet(
        [image for image in images if image is not None], [str(i + 1) for i in range(len(shown))]
    )
    with placed_at(out) as directory:
        write_picture(directory / SHEET_FILE, sheet)
        paths = [_path(pool, i, number, directory) for number, i in enumerate(positions, 1)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label", "group", "images_in_group"])
        groups, sizes = choice.groups.tolist(), choice.sizes.tolist()
        writer.writerows(zip(paths, [""] * len(paths), groups, sizes, strict=True))
        write_bytes(directory / TABLE_FILE, text.getvalue().encode("utf-8", "surrogateescape"))
        write_names(directory / NAMES_FILE, [pool.name(i) for i in positions])


def _path(pool: Subset, i: int, number: int, directory: Path) -> str:
    """The path in the table: the file itself, or a copy of an image that is not a file.

    Args:
        pool: all images.
        i: position of the image in the pool.
        number: of the image in the table, from 1.
        directory: of the table; a copy is put there, and its path is relative to it.
    """
    if isinstance(pool.source, FileSource):
        return pool.source.path(int(pool.positions[i]))
    image = open_image(pool, i)
    assert image is not None  # `_Chooser.choose` takes readable ones
    copy = Path(COPIES, f"{number:04d}.png")
    (directory / COPIES).mkdir(exist_ok=True)
    write_picture(directory / copy, image)
    return str(copy)


def _print_comparison(
    rows: Sequence[Mapping[str, Any]],
    covered: Mapping[str, Sequence[int]],
    budget: int,
    num_classes: int,
) -> None:
    table = Table(title=f"logistic regression with {budget} labels", title_justify="left")
    for heading in ("labelled images", "top-1 %", f"classes among them (of {num_classes})"):
        table.add_column(heading, justify="left" if heading == "labelled images" else "right")
    for row in rows:
        name, classes = row["labels"], covered[row["labels"]]
        spread = f" +- {100 * row['top1_std']:.1f}" if row["splits"] > 1 else ""
        title = f"random, {row['splits']} seeds" if name == "random" else name
        cells = (f"{100 * row['top1_mean']:.1f}{spread}", f"{sum(classes) / len(classes):.1f}")
        table.add_row(title, *cells)
    Console().print(table)
