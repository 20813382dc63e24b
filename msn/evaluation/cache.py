"""Features on disk, in parts that are whole or not there: what is damaged is computed again."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from msn.errors import UserError
from msn.weights.tensors import save_tensors
from msn.weights.weights import trunk_digest

log = logging.getLogger(__name__)

_FORMAT = 2


class FeatureCache:
    """Parts of one feature matrix under a key of everything that made it.

    Args:
        directory: of all caches; one folder a key is made in it.
        key: plain data that determines the features: weights, preprocessing, file list.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any]) -> None:
        text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.directory = directory / self.digest[:32]

    def load(self, part: int, rows: int) -> Tensor | None:
        """Read a part of so many rows; None if it is missing, truncated, altered or not ours."""
        path = self._path(part)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                features = file.get_tensor("features")
        except (SafetensorError, OSError) as error:
            log.warning("feature cache: %s is damaged and made again (%s)", path, error)
            return None
        whole = (
            metadata.get("key") == self.digest
            and features.shape[0] == rows
            and metadata.get("sha256") == digest_of(features)
        )
        if not whole:
            log.warning("feature cache: %s is not what was written and made again", path)
            return None
        return features

    def store(self, part: int, features: Tensor) -> None:
        """Write a part, all or nothing; a cache that cannot be written is a cache not used."""
        metadata = {"key": self.digest, "sha256": digest_of(features)}
        try:
            save_tensors(self._path(part), {"features": features}, metadata)
        except UserError as error:
            log.warning("feature cache: cannot write below %s (%s)", self.directory, error)

    def _path(self, part: int) -> Path:
        return self.directory / f"part-{part:05d}.safetensors"


def weights_key(module: nn.Module) -> str:
    """Digest of every parameter and buffer with its name: other weights, other features."""
    return trunk_digest(module.state_dict())


def images_key(identities: Iterable[str]) -> str:
    """Digest of a list of images, in order."""
    digest = hashlib.sha256()
    for identity in identities:
        digest.update(os.fsencode(identity) + b"\0")
    return digest.hexdigest()


def digest_of(tensor: Tensor) -> str:
    """Digest of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
