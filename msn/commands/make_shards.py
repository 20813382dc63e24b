"""`python -m msn make_shards root=DIR out=DIR`: a folder, a list or a data set as tar shards."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from msn.commands.entry import to_plain
from msn.data.hf import hf_sources
from msn.data.layout import TRAIN, find_parts
from msn.data.lists import BY_NAME
from msn.data.pools import refuse_shared
from msn.data.shard_writer import write_shards
from msn.data.sources import Source, folder_source, list_source
from msn.errors import UserError
from msn.schema import as_argument, whole_number


def run(config: DictConfig) -> None:
    """Write the shards, what trains and what is held out apart, and say how to use them.

    Raises:
        UserError: if a path or a number is wrong.
    """
    settings = to_plain(config)
    root, out = str(settings["root"]), Path(str(settings["out"]))
    count = whole_number("images_per_shard", settings["images_per_shard"], 1)
    _refuse_used(out)
    # All are found before one is written: a mistake in the second leaves nothing behind.
    parts = _parts(root, out, settings)
    if len(parts) > 1:
        refuse_shared(*parts.values())
    with _emptied_on_failure(out):
        for folder, source in parts.items():
            shards, images = write_shards(source, folder, images_per_shard=count)
            known = source.labels is not None
            labels = f"{len(source.classes)} classes" if known else f"no labels ({source.why})"
            without = f" ({len(source) - images} left out)" if images < len(source) else ""
            print(f"{images} images{without}, {labels}, in {len(shards)} shards: {folder}")
    print(f"train on them: python train.py data=shards {as_argument('data.root', out)}")


def _visible(out: Path) -> list[Path]:
    return [entry for entry in out.iterdir() if entry.name[0] != "."] if out.is_dir() else []


@contextmanager
def _emptied_on_failure(out: Path) -> Iterator[None]:
    """Remove the shards of a command that a full disk or Ctrl-C ends, so that it can be repeated.

    `_refuse_used` has seen that nothing of another's stands there.
    """
    made = not out.exists()
    try:
        yield
    except BaseException:
        for entry in _visible(out):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if made and out.is_dir():
            out.rmdir()
        raise


def _refuse_used(out: Path) -> None:
    """What lies there already would change which shards train and which are held out."""
    if _visible(out):
        raise UserError(f"out={out}: is not empty; choose a new folder")


def _parts(root: str, out: Path, settings: dict[str, Any]) -> dict[Path, Source]:
    """What trains and what is held out, by the folder of its shards."""
    use_labels = settings["use_labels"]
    if settings["source"] not in ("auto", "hf"):
        raise UserError(f"source={settings['source']}: must be auto (a folder or a list) or hf")
    if settings["source"] == "hf":
        train, held_out = hf_sources(root, None, columns=BY_NAME, use_labels=use_labels)
        return {out: train} if held_out is None else {out / TRAIN: train, out / "val": held_out}
    return {
        out if part == root else out / Path(part).name: _source(part, use_labels)
        for part in find_parts(root, None)
        if part is not None
    }


def _source(root: str, use_labels: bool) -> Source:
    if Path(root).is_file():
        return list_source(root, key="root", root=None, use_labels=use_labels)
    return folder_source(root, key="root", use_labels=use_labels)
