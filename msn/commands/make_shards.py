"""`python -m msn make_shards root=DIR out=DIR`: a folder or list of images as tar shards."""

from pathlib import Path

from omegaconf import DictConfig

from msn.commands.entry import to_plain
from msn.data.shard_writer import write_shards
from msn.data.sources import folder_source, list_source
from msn.errors import UserError


def run(config: DictConfig) -> None:
    """Write the shards, of `train` and `val` apart where both are there, and say how to use them.

    Raises:
        UserError: if a path or a number is wrong.
    """
    settings = to_plain(config)
    root, out, count = (
        str(settings["root"]),
        Path(str(settings["out"])),
        settings["images_per_shard"],
    )
    if not isinstance(count, int) or isinstance(count, bool):
        raise UserError(f"images_per_shard={count}: must be a whole number >= 1")
    parts = [part for part in ("train", "val") if (Path(root) / part).is_dir()]
    for part in parts if len(parts) == 2 else [""]:
        folder = str(Path(root) / part) if part else root
        if Path(folder).is_file():
            source = list_source(folder, key="root", root=None, use_labels=settings["use_labels"])
        else:
            source = folder_source(folder, key="root", use_labels=settings["use_labels"])
        shards = write_shards(source, out / part, images_per_shard=count)
        labels = f"{len(source.classes)} classes" if source.labels is not None else "no labels"
        print(f"{len(source)} images, {labels}, in {len(shards)} shards: {out / part}")
    print(f"train on them: python train.py data=shards data.root={out}")
