"""Check settings against signatures: YAML holds values, keyword-only signatures are the schema.

A signature is that of a function, of a class, or of a frozen dataclass of settings; a class that
has its keywords in such a dataclass names it as its `Settings`.
"""

import inspect
import math
import os
import re
import shlex
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from msn.errors import UserError

# Larger numbers are infinite in float32.
_LARGEST = 3.4e38
_LARGEST_WHOLE = 2**63 - 1
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_Made = TypeVar("_Made")


class Range(NamedTuple):
    """Bounds of a number, or of each of two rising ones: `Annotated[float, Range(0, 1)]`."""

    low: float
    high: float = math.inf
    above_low: bool = False
    """Whether `low` itself is outside."""
    below_high: bool = False
    """Whether `high` itself is outside."""

    def holds(self, value: float | Sequence[float] | None) -> bool:
        """Whether a value is in the range; None always is."""
        if value is None:
            return True
        if isinstance(value, Sequence):
            return len(value) == 2 and value[0] <= value[1] and all(map(self.holds, value))
        if self.above_low and value == self.low or self.below_high and value == self.high:
            return False
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """The range in a message."""
        if self.high == math.inf:
            return f"{'>' if self.above_low else '>='} {self.low:g}"
        first, last = "(" if self.above_low else "[", ")" if self.below_high else "]"
        return f"in {first}{self.low:g}, {self.high:g}{last}"


def check_ranges(prefix: str, settings: Any) -> None:
    """Check the numbers of a dataclass against the ranges in its annotations.

    Args:
        prefix: where the settings stand, for messages.
        settings: an instance whose types are checked.

    Raises:
        UserError: one is outside its range.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for allowed in getattr(hint, "__metadata__", ()):
            if not allowed.holds(value):
                pair = isinstance(value, Sequence)
                what = "two numbers, least and greatest, both " if pair else ""
                raise UserError(f"{prefix}.{name}={value}: must be {what}{allowed}")


def make(
    prefix: str,
    settings: Mapping[str, Any],
    target: Callable[..., _Made],
    *,
    complete: bool = False,
) -> _Made:
    """Call a target with the settings that it takes; see `take`.

    Args:
        prefix: where the settings stand, for messages.
        settings: names and values.
        target: see `take`.
        complete: refuse settings that the target does not take.
    """
    if complete:
        refuse_unknown(prefix, settings, target)
    return target(**take(prefix, settings, target))


def take(
    prefix: str,
    settings: Mapping[str, Any],
    target: Callable[..., Any],
    *,
    derived: Sequence[str] = (),
) -> dict[str, Any]:
    """The settings that `target` takes by keyword, with their types checked.

    Args:
        prefix: where the settings stand, for messages, e.g. "method".
        settings: names and values.
        target: class or function with annotated keyword-only parameters.
        derived: parameters that are computed, not set.

    Raises:
        UserError: if a value has another type than its annotation, is a number that is not finite
            in single precision or whole and beyond 64 bits, or is missing and has no default.
    """
    target = _with_keywords(target)
    for name, parameter in inspect.signature(target).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is _KEYWORD
        if required and name not in settings and name not in derived:
            raise UserError(f"{prefix}.{name} is missing: it cannot be left out")
    taken = {name: settings[name] for name in keywords(target) if name in settings}
    plain_class = inspect.isclass(target) and not is_dataclass(target)
    hints = get_type_hints(target.__init__ if plain_class else target)
    for name, value in taken.items():
        if name in hints and not _fits(value, hints[name]):
            expected = _describe(hints[name])
            if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
                expected += " of less than 19 digits"
            raise UserError(f"{prefix}.{name} must be {expected}, got {value!r}")
    return taken


def refuse_unknown(
    prefix: str,
    settings: Mapping[str, Any],
    *targets: Callable[..., Any],
    derived: Sequence[str] = (),
) -> None:
    """Refuse settings that are not a keyword of any target, or are `derived`.

    Raises:
        UserError: names the first unknown key and all allowed ones.
    """
    names = [name for target in targets for name in keywords(target)]
    allowed = [name for name in names if name not in derived]
    for name in settings:
        if name not in allowed:
            raise UserError(f"unknown key {prefix}.{name}: allowed are {', '.join(allowed)}")


def keywords(target: Callable[..., Any]) -> list[str]:
    """Names of the keyword-only parameters of a class or function."""
    parameters = inspect.signature(_with_keywords(target)).parameters.values()
    return [p.name for p in parameters if p.kind is _KEYWORD]


def _with_keywords(target: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(target, "Settings", target)


def whole_number(name: str, value: Any, least: int) -> int:
    """The value of a setting that must be a whole number >= `least`.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be a whole number >= {least}, got {value!r}")
    return value


def check_switch(name: str, value: Any) -> None:
    """Raise a UserError unless a setting is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {value!r}")


def flat(prefix: str, settings: Any) -> list[tuple[str, Any]]:
    """Nested settings as pairs of a full key ("data.views.rand_views") and its value."""
    if not isinstance(settings, Mapping):
        return [(prefix, settings)]
    dot = f"{prefix}." if prefix else ""
    return [pair for key, value in settings.items() for pair in flat(f"{dot}{key}", value)]


def as_argument(key: str, path: str | os.PathLike[str]) -> str:
    """`key=path`, quoted for a shell so that the commands read exactly this path."""
    text = os.fspath(path)
    if text.lower() == "null" or re.match(r"['\"\[]", text) or "~" in text or "${" in text:
        text = text.replace("${", r"\${")
        text = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + (found[2] and r"\'"), text)
        text = f"'{text}'"  # as Hydra's grammar quotes
    return shlex.quote(f"{key}={text}")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:  # 1 is a fine 1.0, True is not
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= _LARGEST  # False for nan
    if hint is int:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and abs(value) <= _LARGEST_WHOLE
    if origin in (list, tuple, Sequence):
        members = [part for part in get_args(hint) if part is not ...]
        return isinstance(value, list | tuple) and all(_fits(v, members[0]) for v in value)
    if origin is not None:
        return isinstance(value, origin)
    return isinstance(value, hint)


_WORDS = {
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in get_args(hint))
    if origin in (list, tuple, Sequence):
        return f"a list of {_describe(get_args(hint)[0])}s".replace("list of a ", "list of ")
    if origin is not None:
        return "a group of keys"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
