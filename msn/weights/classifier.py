"""Read a classifier that was fitted on frozen features, and fold it into LayerNorm and Linear.

Legend: C classes, D embedding width; x a class token before the final norm, c = x - mean(x).

Low-shot heads see u = c / |c| (paper A.2). LayerNorm without affine gives
z = c / sqrt(|c|^2 / D + eps). This is sqrt(D) u times a positive factor per image, which would be 1
if eps were 0. So weight / sqrt(D) on z gives the head's logits times that factor: without an
intercept, every argmax is the same for any eps and any trained affine of the norm.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msn.errors import UserError
from msn.weights.tensors import open_weights
from msn.weights.weights import check_tensors


@dataclass(frozen=True)
class Classifier:
    """A linear head that the low-shot evaluation has saved."""

    weight: Tensor
    """[C, D]."""
    bias: Tensor | None
    """[C], or None where no intercept was fitted."""
    classes: tuple[str, ...]
    """Name of each of the C classes."""
    feature: str
    """class_token (before the final norm), class_token_norm (after it), patch_mean,
    patch_mean_norm or last_N."""
    centred: bool
    """Each feature row has its own mean subtracted."""
    normalised: bool
    """Each feature row is divided by its L2 norm, after centring."""
    weights: str | None = None
    """`trunk_digest` of the backbone that made the features, if the file says it."""


class FoldedHead(NamedTuple):
    """What replaces the final norm's affine and the classifier in a ViT with a linear head."""

    norm_weight: Tensor
    """[D]."""
    norm_bias: Tensor
    """[D]."""
    weight: Tensor
    """[C, D]."""
    bias: Tensor
    """[C]."""


def read_classifier(path: str | Path, embed_dim: int) -> Classifier:
    """Read a head of the low-shot evaluation (safetensors, header `msn`).

    Args:
        path: the file.
        embed_dim: D of the backbone it must fit.

    Raises:
        UserError: if this is not such a head, or it belongs to a backbone of another width.
    """
    tensors, metadata = open_weights(Path(path))
    try:
        header = json.loads(metadata["msn"])
        weight, bias = tensors["weight"].float(), tensors.get("bias")
        classes = tuple(str(name) for name in header["classes"])
        settings = {key: header[key] for key in ("feature", "centred", "normalised")}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"head {path}: not a head of the low-shot evaluation ({repr(error)[:80]})"
        ) from error
    if header.get("crop", "centre") != "centre":
        raise UserError(
            f"head {path}: was fitted on whole images (features.crop={header['crop']}), but the "
            "preprocessing of an export crops them"
        )
    check_tensors(tensors, f"head {path}")
    if weight.ndim != 2 or weight.shape[1] != embed_dim or weight.shape[0] != len(classes):
        want = [len(classes), embed_dim]
        raise UserError(f"head {path}: weight is {list(weight.shape)}, this backbone needs {want}")
    if bias is not None and not bool(bias.any()):
        bias = None
    bias = None if bias is None else bias.float()
    return Classifier(weight, bias, classes, **settings, weights=header.get("weights"))


def fold(head: Classifier, norm_weight: Tensor, norm_bias: Tensor) -> FoldedHead:
    """Express a head as a final LayerNorm and a linear layer on the class token.

    Two cases are exact: a head without intercept on row-centred, normalised class tokens before the
    norm (the affine becomes the identity, see above), and a head on unnormalised class tokens after
    it.

    Args:
        head: the fitted head.
        norm_weight: of the backbone's final norm, [D].
        norm_bias: of the backbone's final norm, [D].

    Raises:
        UserError: if no such pair gives the head's predictions; says why.
    """
    classes, width = head.weight.shape
    bias = torch.zeros(classes) if head.bias is None else head.bias
    if head.feature == "class_token_norm" and not head.normalised:
        centred = head.weight - head.weight.mean(dim=1, keepdim=True)
        return FoldedHead(norm_weight, norm_bias, centred if head.centred else head.weight, bias)
    reason = _why_not(head)
    if reason is not None:
        raise UserError(f"head: cannot be folded into the final norm's linear layer: {reason}")
    return FoldedHead(torch.ones(width), torch.zeros(width), head.weight / math.sqrt(width), bias)


def predict(head: Classifier, tokens: Tensor, norm: torch.nn.Module) -> Tensor:
    """The head's logits as in the low-shot evaluation.

    Args:
        head: the fitted head; one that `fold` accepts.
        tokens: class tokens before the final norm, [B, D].
        norm: the backbone's final norm.

    Returns:
        [B, C].
    """
    rows = norm(tokens) if head.feature == "class_token_norm" else tokens
    if head.centred:
        rows = rows - rows.mean(dim=1, keepdim=True)
    if head.normalised:
        rows = F.normalize(rows, dim=1)
    bias = None if head.bias is None else head.bias.to(rows)
    return F.linear(rows, head.weight.to(rows), bias)


def layer_norm_factor(head: Classifier, tokens: Tensor, eps: float) -> Tensor:
    """Factor in (0, 1] by which eps shrinks a folded head's logits, [B, D] -> [B, 1]."""
    if not head.normalised:
        return torch.ones_like(tokens[:, :1])
    variance = tokens.var(dim=1, unbiased=False, keepdim=True)
    return torch.sqrt(variance / (variance + eps))


def _why_not(head: Classifier) -> str | None:
    if head.feature in ("patch_mean", "patch_mean_norm"):
        return "it was fitted on the mean of the patches, but the linear layer sees the class token"
    if head.feature == "class_token_norm":
        return (
            "it was fitted on normalised features after the final norm, whose length differs per "
            "image, and nothing divides by it"
        )
    if head.feature.startswith("last_"):
        return "it was fitted on class tokens of several blocks, but the linear layer sees the last"
    if head.feature != "class_token":
        return f"feature is {head.feature!r}, known are class_token, class_token_norm, patch_mean"
    if not (head.centred and head.normalised):
        return (
            "it was fitted on class tokens before the final norm that are not both row-centred and "
            "normalised, but the norm does both"
        )
    if head.bias is not None:
        return "it has an intercept, and eps of the final norm would shrink the logits around it"
    return None
