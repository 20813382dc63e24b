"""Write weights for another library, load them there, compare, and only then put them in place."""

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from msn.errors import UserError
from msn.method.vit import VisionTransformer, resize_position_embeddings
from msn.weights.backbone import complete_meta
from msn.weights.card import model_card
from msn.weights.classifier import Classifier
from msn.weights.files import sync_directory, user_umask, write_bytes, writing_to
from msn.weights.formats import FORMATS, Export, Format, write_json
from msn.weights.loading import versions
from msn.weights.parity import check
from msn.weights.reading import read_weights
from msn.weights.weights import Weights, build_trunk


def export(
    weights: Weights,
    *,
    format: str,
    out: Path,
    image_size: int | None,
    head: Classifier | None,
    overwrite: bool,
    lowshot: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """Write a directory for another library and prove that it computes the same there.

    Args:
        weights: what to export; narrowed to float32.
        format: one of `FORMATS`.
        out: the directory to make.
        image_size: native size of the export in pixels, a multiple of the patch size; None keeps
            that of the weights. Position embeddings are resized as the paper does.
        head: a classifier to put on top; for huggingface alone.
        overwrite: replace `out` where it exists.
        lowshot: rows of a lowshot.json for the model card, None where there are none.

    Returns:
        The content of `parity.json`.

    Raises:
        UserError: on a wrong argument, a failed comparison, or a place that cannot be written;
            nothing is left then, and what stood at `out` still stands.
    """
    kind = _format(format, head)
    out = out.resolve()
    _check_free(out, overwrite)
    resized = _at_size(weights, image_size)
    header = complete_meta({**weights.meta, "model": resized.model})
    content = Export(resized, header, head)
    with _placed_at(out) as directory:
        kind.write(content, directory)
        trunk = build_trunk(resized)
        report = {"format": format, **check(trunk, head, kind.load(directory))}
        report["weights_bit_equal"] = _check_round_trip(directory, trunk)
        report["versions"] = versions()
        write_json(directory / "parity.json", report)
        card = model_card(format, header, head=head, report=report, lowshot=lowshot)
        write_bytes(directory / "README.md", card.encode())
    return report


def _format(name: str, head: Classifier | None) -> Format:
    if name not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    if head is not None and name != "huggingface":
        raise UserError(f"head needs format=huggingface, got format={name}")
    kind = FORMATS[name]
    missing = [package for package in kind.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"format={name} needs {', '.join(missing)}, which is not installed: "
            f"pip install 'msn[{kind.extra}]'"
        )
    return kind


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"out={out} exists; overwrite=true replaces it")
    # An export is flat: a directory that is not was made for something else.
    if not out.is_dir() or any(entry.is_dir() for entry in out.iterdir()):
        raise UserError(f"out={out} is not an export (a directory of files only): not replaced")


def _at_size(weights: Weights, image_size: int | None) -> Weights:
    """The same weights in float32, with position embeddings for another image size."""
    trunk = {name: tensor.float() for name, tensor in weights.trunk.items()}
    model = dict(weights.model)
    if image_size is None or image_size == model["img_size"]:
        return dataclasses.replace(weights, trunk=trunk)
    patch = int(model["patch_size"])
    if not isinstance(image_size, int) or image_size < patch or image_size % patch:
        raise UserError(
            f"image_size must be a multiple of the patch size {patch}, got {image_size}"
        )
    grid = (image_size // patch, image_size // patch)
    trunk["pos_embed"] = resize_position_embeddings(trunk["pos_embed"], grid)
    anchor = weights.anchor_trunk
    if anchor is not None:
        anchor = {**anchor, "pos_embed": resize_position_embeddings(anchor["pos_embed"], grid)}
    model["img_size"] = image_size
    return dataclasses.replace(weights, trunk=trunk, anchor_trunk=anchor, model=model)


def _check_round_trip(directory: Path, trunk: VisionTransformer) -> bool:
    """True; an export that we do not read back bit by bit is an error of ours or of the disk."""
    again = read_weights(directory, num_heads=trunk.num_heads).trunk
    states = trunk.state_dict()
    if not all(torch.equal(tensor, states[name]) for name, tensor in again.items()):
        raise UserError("the export does not read back bit by bit; nothing written")
    return True


@contextlib.contextmanager
def _placed_at(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` if the block succeeds."""
    with writing_to(out):
        made = [parent for parent in out.parents if not parent.exists()]
        temporary = None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            temporary.chmod(0o777 & ~user_umask())
            yield temporary
            sync_directory(temporary)
            _swap(temporary, out)
            sync_directory(out.parent)
        except BaseException:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def _swap(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    os.replace(out, old / "old")
    try:
        os.replace(new, out)
    except OSError:
        os.replace(old / "old", out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
