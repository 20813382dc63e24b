"""The vision transformer in what people wrap around one: dictionaries, prefixes, a second half."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from msn.errors import UserError
from msn.weights.weights import strip_prefix

# The one tensor that every vision transformer has, in timm's and in Hugging Face's names.
_MARKS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
_MAX_NESTED = 4
_BARE = "."


class Candidate(NamedTuple):
    """The tensors of one trunk, and what stands beside them."""

    name: str
    """What `init_key` calls it: dictionaries and prefix, joined by dots."""
    tensors: dict[str, Tensor]
    """Without the prefix."""
    beside: tuple[str, ...]
    """Names in the same dictionary that do not have the prefix."""


def find_trunk(content: Mapping[Any, Any], key: str | None, where: str) -> Candidate:
    """The one trunk in nested dictionaries of tensors, or the one that a person chose.

    Where there is none, the dictionary with most tensors, as it is.

    Args:
        content: what a file holds.
        key: the name of a trunk, or its beginning up to a dot; None where there is only one.
        where: the path, for messages.

    Raises:
        UserError: if there are no tensors, several trunks and no key, or none of that key.
    """
    dictionaries = _dictionaries(content)
    found = [
        _candidate(path, tensors, name.removesuffix(mark))
        for path, tensors in dictionaries
        for name in tensors
        for mark in _MARKS
        if name == mark or name.endswith(f".{mark}")
    ]
    names = ", ".join(sorted(candidate.name for candidate in found)[:10])
    if key is not None:
        found = [one for one in found if one.name == key or one.name.startswith(f"{key}.")]
        if len(found) != 1:
            if names == _BARE:
                raise UserError(
                    f"{where}: init_key={key}: the file holds one backbone, without a name; leave "
                    "init_key out"
                )
            raise UserError(f"{where}: init_key={key} must be one of {names or 'none'}")
    if len(found) > 1:
        raise UserError(f"{where}: holds several backbones, {names}: init_key=NAME chooses one")
    if not found:
        path, tensors = max(dictionaries, key=lambda entry: len(entry[1]), default=("", {}))
        if not tensors:
            raise UserError(f"{where}: holds no tensors")
        return Candidate(_BARE, tensors, ())
    return found[0]


def _candidate(path: str, tensors: dict[str, Tensor], prefix: str) -> Candidate:
    name = f"{path}.{prefix}".strip(".") or _BARE
    beside = tuple(other for other in tensors if not other.startswith(prefix))
    return Candidate(name, strip_prefix(tensors, prefix), beside)


def _dictionaries(content: Mapping[Any, Any]) -> list[tuple[str, dict[str, Tensor]]]:
    """Every dictionary with tensors, with the names that lead to it, each once."""
    found, seen, left = [], set(), [("", content, 0)]
    while left:
        path, entries, depth = left.pop()
        if id(entries) in seen:
            continue
        seen.add(id(entries))
        named = {name: value for name, value in entries.items() if isinstance(name, str)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if tensors:
            found.append((path, tensors))
        left += [
            (f"{path}.{name}".strip("."), value, depth + 1)
            for name, value in named.items()
            if isinstance(value, dict) and depth < _MAX_NESTED
        ]
    return found
