"""`load_mae`: open a masked autoencoder, trunk and decoder, from files of any origin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msn.errors import UserError
from msn.method.mae import MAE, Decoder
from msn.method.vit import VisionTransformer
from msn.weights.backbone import transform_of
from msn.weights.reading import newest_valid_checkpoint, read_weights
from msn.weights.weights import Weights, check_heads, differences, say_notes, summary

# The paper's decoder, mask and published targets (arXiv 2111.06377, section 3 and Table 1).
DECODER = {"embed_dim": 512, "depth": 8, "num_heads": 16}
MASK_RATIO = 0.75


class LoadedMAE(MAE):
    """An `msn.MAE` from a file.

    Args:
        weights: as `read_weights` gives them; a missing decoder is initialised.
        method: `decoder`, `mask_ratio` and `norm_pix_loss`, see `MAE`.

    Attributes:
        transform: from a path, a PIL image of any mode or a uint8 tensor [3, H, W] to the tensor
            [3, S, S] that the network was made for, see `msn.weights.backbone.image_transform`.
        meta: what the file says about itself (epoch, data, method, licence, ...).
        decoder_from_file: whether the decoder is the file's.
    """

    def __init__(self, weights: Weights, method: Mapping[str, Any]) -> None:
        super().__init__(model=weights.model, **method)
        self.to(weights.trunk["cls_token"].dtype)
        self.trunk.load_state_dict(weights.trunk, strict=True)
        if weights.decoder is not None:
            self.decoder.load_state_dict(weights.decoder, strict=True)
        self.decoder_from_file = weights.decoder is not None
        self.meta, self.transform = weights.meta, transform_of(weights)


def load_mae(
    path: str | Path,
    *,
    num_heads: int | None = None,
    key: str | None = None,
    decoder: Mapping[str, int] | None = None,
    mask_ratio: float | None = None,
    norm_pix_loss: bool | None = None,
) -> LoadedMAE:
    """Load a masked autoencoder for use or further training, in eval mode.

    Args:
        path: a run with `method=mae` or its checkpoint; a Hugging Face ViTMAE directory; a file in
            the layout of facebookresearch/mae, with decoder or without; the trunk of any other file
            that `read_weights` takes. A missing decoder is initialised from torch's generator, and
            a warning says so.
        num_heads: attention heads of the trunk, used where the file does not say.
        key: which of several trunks in the file, see `read_weights`.
        decoder: `embed_dim`, `depth`, `num_heads` of the decoder, used where the file does not say;
            by default the paper's 512, 8, 16.
        mask_ratio: of `forward`, in (0, 1); None takes the file's, else the paper's 0.75.
        norm_pix_loss: whether predictions are of normalised patches. None takes what the file says;
            else False, as in the published files with decoder, or True, the paper's recipe, with a
            new decoder. A warning tells what was assumed.

    Returns:
        An `msn.MAE`, float32 (float64 where the file is), with `meta` and `transform`. Its
        `forward(images [B, 3, S, S], noise [B, N])` gives loss, prediction [B, N, 3 p p] and mask
        [B, N].

    Raises:
        UserError: see `read_weights`; or the file's decoder is incomplete or contradicts an
            argument; or the file was fine-tuned to classify, which removes the final norm.
    """
    # The backbone of a run is a trunk alone; its newest checkpoint has the decoder.
    source = newest_valid_checkpoint(Path(path) / "checkpoints") or path
    weights = read_weights(source, num_heads=num_heads, key=key)
    check_heads(weights, num_heads, str(path))
    method, assumed = mae_method(weights, decoder or {}, str(path))
    given = {"mask_ratio": mask_ratio, "norm_pix_loss": norm_pix_loss}
    method |= {name: value for name, value in given.items() if value is not None}
    if norm_pix_loss is not None:
        assumed = tuple(note for note in assumed if not note.startswith("norm_pix_loss"))
    say_notes(weights, str(path))
    say_notes(assumed, str(path))
    return LoadedMAE(weights, method).eval()


def mae_method(
    weights: Weights, given: Mapping[str, int], where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Settings of an `MAE` for some weights: what they say, else the paper's.

    Args:
        weights: of any source.
        given: numbers of the decoder, used where the weights do not say them.
        where: the path, for messages.

    Returns:
        `decoder`, `mask_ratio`, `norm_pix_loss`, and what was assumed.

    Raises:
        UserError: if these are not weights of a masked autoencoder.
    """
    if weights.meta.get("pool") == "mean":
        raise UserError(
            f"{where}: was fine-tuned to classify: it has fc_norm, not the norm that a masked "
            "autoencoder needs; msn.load_backbone reads it"
        )
    said = weights.meta.get("method")
    said = said if weights.meta.get("kind") == "mae" and isinstance(said, dict) else {}
    if weights.decoder is None:
        told = said.get("decoder")
        numbers = {**DECODER, **(told if isinstance(told, dict) else {}), **given}
        notes: tuple[str, ...] = (f"holds no decoder: one is initialised ({_in_words(numbers)})",)
    else:
        numbers, notes = _decoder_numbers(weights, said.get("decoder"), given, where)
    ratio, normalised = said.get("mask_ratio", MASK_RATIO), said.get("norm_pix_loss")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise UserError(f"{where}: mask_ratio must be in (0, 1), got {ratio!r:.80}")
    if normalised is None and weights.decoder is not None:
        notes += (
            "norm_pix_loss: false assumed, as the published files predict pixels; "
            "norm_pix_loss=True says otherwise",
        )
    if normalised is None:
        normalised = weights.decoder is None
    if not isinstance(normalised, bool):
        raise UserError(f"{where}: norm_pix_loss must be true or false, got {normalised!r:.80}")
    return {"decoder": numbers, "mask_ratio": ratio, "norm_pix_loss": normalised}, notes


def _decoder_numbers(
    weights: Weights, said: Any, given: Mapping[str, int], where: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Width and depth from the shapes; heads from the file, the caller or the paper."""
    tensors = weights.decoder or {}
    if "embed.weight" not in tensors or tensors["embed.weight"].ndim != 2:
        raise UserError(f"{where}: its decoder is not whole: decoder_embed.weight is missing")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    numbers = {"embed_dim": len(tensors["embed.weight"]), "depth": depth}
    told = said if isinstance(said, dict) else {}
    notes: tuple[str, ...] = ()
    heads = told.get("num_heads", given.get("num_heads"))
    if heads is None and numbers["embed_dim"] == DECODER["embed_dim"]:
        heads = DECODER["num_heads"]
        notes = (f"attention heads of the decoder: {heads} assumed (MAE, arXiv 2111.06377)",)
    if heads is None:
        raise UserError(
            f"{where}: does not say its decoder's number of attention heads, and width "
            f"{numbers['embed_dim']} is not the paper's: give decoder={{'num_heads': N}}"
        )
    numbers["num_heads"] = heads
    wrong = [
        f"{name} is {numbers[name]}, not {value}"
        for name, value in given.items()
        if numbers.get(name) != value
    ]
    if wrong:
        raise UserError(f"{where}: the file's own decoder: {summary(wrong)}")
    if depth < 1 or (found := differences(tensors, _expected(weights, numbers))):
        what = "decoder_blocks.0 is missing" if depth < 1 else summary(found)
        raise UserError(f"{where}: its decoder is not whole, or another: {what}")
    return numbers, notes


def _expected(weights: Weights, numbers: Mapping[str, int]) -> Mapping[str, Tensor]:
    with torch.device("meta"):
        return Decoder(VisionTransformer(**weights.model), **numbers).state_dict()


def _in_words(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in numbers.items())
