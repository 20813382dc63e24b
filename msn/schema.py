"""Settings against signatures: YAML holds the values, keyword-only signatures are the schema."""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from msn.errors import UserError

# Larger numbers become infinite in the type that networks compute in.
_LARGEST = 3.4e38
_LARGEST_WHOLE = 2**63 - 1
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def take(
    prefix: str,
    settings: Mapping[str, Any],
    target: Callable[..., Any],
    *,
    derived: Sequence[str] = (),
) -> dict[str, Any]:
    """Those of `settings` that `target` takes by keyword, with their types checked.

    Args:
        prefix: where the settings stand, for messages, e.g. "method".
        settings: names and values.
        target: class or function with annotated keyword-only parameters.
        derived: parameters that are computed, not set.

    Raises:
        UserError: if a value has another type than its annotation, is a number that is not finite
            in single precision or whole and beyond 64 bits, or is missing and has no default.
    """
    for name, parameter in inspect.signature(target).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is _KEYWORD
        if required and name not in settings and name not in derived:
            raise UserError(f"{prefix}.{name} is missing: it cannot be left out")
    taken = {name: settings[name] for name in keywords(target) if name in settings}
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
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
    """Every setting must be a keyword of one of the targets, but none of the `derived` ones.

    Raises:
        UserError: that names the first unknown key and all allowed ones.
    """
    names = [name for target in targets for name in keywords(target)]
    allowed = [name for name in names if name not in derived]
    for name in settings:
        if name not in allowed:
            raise UserError(f"unknown key {prefix}.{name}: allowed are {', '.join(allowed)}")


def keywords(target: Callable[..., Any]) -> list[str]:
    """Names of the keyword-only parameters of a class or function."""
    parameters = inspect.signature(target).parameters.values()
    return [p.name for p in parameters if p.kind is _KEYWORD]


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
