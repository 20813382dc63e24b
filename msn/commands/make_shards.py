"""`python -m msn make_shards root=DIR out=DIR`: a folder or list of images as tar shards."""

import shlex
from pathlib import Path

from omegaconf import DictConfig

from msn.commands.entry import to_plain
from msn.data.layout import find_parts
from msn.data.pools import refuse_shared
from msn.data.shard_writer import write_shards
from msn.data.sources import FileSource, folder_source, list_source
from msn.errors import UserError


def run(config: DictConfig) -> None:
    """Write the shards, what trains and what is held out apart, and say how to use them.

    Raises:
        UserError: if a path or a number is wrong.
    """
    settings = to_plain(config)
    root, out = str(settings["root"]), Path(str(settings["out"]))
    count = settings["images_per_shard"]
    if not isinstance(count, int) or isinstance(count, bool):
        raise UserError(f"images_per_shard={count}: must be a whole number >= 1")
    _refuse_used(out)
    # All are found before one is written: a mistake in the second leaves nothing behind.
    parts = {
        out if part == root else out / Path(part).name: _source(part, settings["use_labels"])
        for part in find_parts(root, None)
        if part is not None
    }
    if len(parts) > 1:
        refuse_shared(*parts.values())
    for folder, source in parts.items():
        shards, images = write_shards(source, folder, images_per_shard=count)
        known = source.labels is not None
        labels = f"{len(source.classes)} classes" if known else f"no labels ({source.why})"
        without = f" ({len(source) - images} left out)" if images < len(source) else ""
        print(f"{images} images{without}, {labels}, in {len(shards)} shards: {folder}")
    print(f"train on them: python train.py data=shards {shlex.quote(f'data.root={out}')}")


def _refuse_used(out: Path) -> None:
    """What lies there already would change which shards train and which are held out."""
    if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise UserError(f"out={out}: is not empty; choose a new folder")


def _source(root: str, use_labels: bool) -> FileSource:
    if Path(root).is_file():
        return list_source(root, key="root", root=None, use_labels=use_labels)
    return folder_source(root, key="root", use_labels=use_labels)
