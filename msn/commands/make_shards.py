"""`python -m msn make_shards root=DIR out=DIR`: a folder, a list or a data set as tar shards."""

from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from omegaconf import DictConfig

from msn.commands.entry import to_plain
from msn.data.groups import refuse_shared
from msn.data.hf import hf_sources
from msn.data.index import system_name
from msn.data.layout import TRAIN, find_parts
from msn.data.lists import BY_NAME
from msn.data.shards import CLASSES_FILE, class_line
from msn.data.sources import Source, folder_source, list_source
from msn.data.tar_members import member_name
from msn.errors import UserError
from msn.files import write_bytes, write_file
from msn.images.kinds import SUFFIXES, BadImageError, open_image
from msn.progress import Progress
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

    `_refuse_used` has checked that nothing else is there.
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


log = logging.getLogger(__name__)

SHARD_NAME = "shard-{:06d}.tar"
_UNLABELLED = "unlabelled/"  # one folder around all others, so that these are not classes


class Written(NamedTuple):
    """The shards that were written, and how many images are in them."""

    shards: list[Path]
    images: int


def write_shards(source: Source, out: Path, *, images_per_shard: int) -> Written:
    """Copy every file of a source, as it is, into shards; with labels, `.cls` files beside them.

    The order stays, so that a run on the shards sees the batches of a run on the folder. Files that
    a run on the shards would not read are left out and named. Nothing stands under its final name
    before it is whole.

    Args:
        source: images with names.
        out: a folder that is made; it must hold no shard yet.
        images_per_shard: >= 1.

    Raises:
        UserError: a wrong number, shards in `out` already, or no space left.
    """
    if images_per_shard < 1:
        raise UserError(f"images_per_shard={images_per_shard}: must be >= 1")
    if out.exists() and (not out.is_dir() or any(out.glob("*.tar"))):
        raise UserError(f"out={out}: holds shards already, or is a file; choose a new folder")
    if source.labels is not None:
        names = "".join(f"{class_line(name)}\n" for name in source.classes)
        write_bytes(out / CLASSES_FILE, os.fsencode(names))
    above = _UNLABELLED if _would_get_labels(source) else ""
    shards: list[Path] = []
    taken: set[str] = set()  # a key for every image that was written
    with Progress("writing shards", total=len(source)) as progress:
        for begin in range(0, len(source), images_per_shard):
            path = out / SHARD_NAME.format(len(shards))
            numbers = range(begin, min(begin + images_per_shard, len(source)))
            _write_shard(path, source, numbers, above, taken, progress)
            shards.append(path)
    return Written(shards, len(taken))


def _write_shard(
    path: Path, source: Source, numbers: range, above: str, taken: set[str], progress: Progress
) -> None:
    def write(file: BinaryIO) -> None:
        kind = tarfile.GNU_FORMAT
        with tarfile.open(fileobj=file, mode="w", format=kind, encoding="utf-8") as tar:
            for i in numbers:
                _add(tar, source, i, above, taken)
                progress.advance()

    write_file(path, write)


def _add(tar: tarfile.TarFile, source: Source, i: int, above: str, taken: set[str]) -> None:
    try:
        data = source.read(i)
        stem, extension = _split(above + _relative(source, i), data)
    except BadImageError as error:
        log.warning("left out: %s (%s)", source.name(i), error)
        return
    except OSError as error:  # too many open files, for instance; else the shard would be blamed
        raise UserError(f"{source.name(i)}: cannot be read ({error.strerror or error})") from error
    key = _key(stem, taken)
    _add_bytes(tar, key + extension, data)
    if source.labels is not None:
        _add_bytes(tar, key + ".cls", b"%d" % source.labels[i])


def _split(name: str, data: bytes) -> tuple[str, str]:
    """Name and extension; a list may name images without one, which readers would not see."""
    stem, extension = os.path.splitext(name)
    if extension.lower() in SUFFIXES:
        return stem, extension
    try:
        kind = str(open_image(data).format).lower()
    except Exception as error:  # decoders raise anything on damaged files
        raise BadImageError("no image, by its name and its bytes") from error
    return name, f".{kind}" if f".{kind}" in SUFFIXES else ".jpg"  # of several pictures, say


def _would_get_labels(source: Source) -> bool:
    """Whether readers, also of some shards alone, may take folders of these images for classes."""
    return source.labels is None and any("/" in _relative(source, i) for i in range(len(source)))


def _relative(source: Source, i: int) -> str:
    """The name inside the shard: a list may name what readers of shards skip."""
    parts = member_name(source.name(i)).split("/")
    return "/".join(f"_{part}" if system_name(part) else part for part in parts)


def _key(stem: str, taken: set[str]) -> str:
    """A sample's key: WebDataset ends it at the first dot, and each must be there once."""
    folder, slash, file = stem.rpartition("/")
    base = folder + slash + file.replace(".", "_")
    key, number = base, 1
    while key in taken:
        key, number = f"{base}_{number}", number + 1
    taken.add(key)
    return key


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)  # no times and owners: the same folder always gives the same bytes
    tar.addfile(member, io.BytesIO(data))
