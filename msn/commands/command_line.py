"""Flags, overrides in which paths and names stay literal, and output streams.

Hydra's grammar would read `run.name=1_1` as a number, and cannot read `data.root=/x/photos (1)`.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from hydra.core.override_parser.types import Quote, QuotedString

from msn.errors import UserError

# Keys whose value is a path or a name; `images` is a number elsewhere.
_PATHS = re.compile(
    r"(.+\.)?(root|\w+_root|labels|file)|run\.\w+|checkpoint|init(_key|_family)?|out|runs|dump|golden|head|json|suite"
    r"|images|cache_dir|logger\.\w+\.(project|name)|protocol\.(lists|lists_dir|write_lists)"
)
# Those that take several, [a,b]; for other keys such a value is a file name.
_LISTS = ("checkpoint", "runs", "protocol.lists")
_QUOTED = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
_PART = re.compile(rf"\s*({_QUOTED}|\[[^\]]*\]|\{{[^}}]*\}})\s*(?=,|$)|[^,]*")
_SWEEP = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)
_PLAIN = re.compile(r"[\w.+/:@-]+")  # text that Hydra reads unchanged
# What may precede a path: its name in a table, a model of timm.
_BEFORE_HOME = re.compile(r"(?:[^/:~]*:)?(?:timm/[^@]*@)?(?=~)")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help says more")


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Flags, and the overrides among them.

    Raises:
        UserError: if a flag does not exist, or needs another that is missing.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--resolve", "-r", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("overrides", nargs="*")
    flags = parser.parse_intermixed_args(arguments)
    if (flags.resolve or flags.package is not None) and flags.cfg is None:
        raise UserError("--resolve and --package go with --cfg job; --help says more")
    return flags


def quote_paths(overrides: list[str], *, sweep: bool = False) -> list[str]:
    """Quote, in Hydra's grammar, the values of keys that are paths or names.

    These keep their meaning: `null`, quoted text, lists for keys that take several, numbers of
    `images` and, in a sweep, choices. `~` is the user's home.

    Args:
        overrides: `key=value`.
        sweep: whether commas separate choices (`--multirun`).

    Raises:
        UserError: if one contains a null byte.
    """
    for override in overrides:
        if "\0" in override:
            raise UserError(f"{override.partition('=')[0]}: a value cannot contain a null byte")
    return [_quote_path(override, sweep) for override in overrides]


def read_mapping(key: str, text: str) -> dict[str, str] | str:
    """`{name:value,...}` as a dictionary of text, without Hydra's numbers; other text unchanged.

    Raises:
        UserError: if a name or a value is missing.
    """
    if not (text.startswith("{") and text.endswith("}")):
        return text
    pairs = [part.partition(":") for part in _parts(text[1:-1])]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    if len(found) < len(pairs) or not all(found) or not all(found.values()):
        raise UserError(f"{key}={text}: write {{name:value,name:value}}")
    return found


def _quote_path(override: str, sweep: bool) -> str:
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    if not value or not _PATHS.fullmatch(name):
        return override
    if name == "images" and re.fullmatch(r"[+-]?\d+", value):
        return override
    choices = [value]
    if sweep:
        choices = [value] if _SWEEP.fullmatch(value) else _parts(value)
    return key + equals + ",".join(_one(name, choice, sweep) for choice in choices)


def _one(name: str, value: str, sweep: bool) -> str:
    if sweep and _SWEEP.fullmatch(value):
        return value
    is_list = name in _LISTS and value.startswith("[") and value.endswith("]")
    if not is_list or os.path.exists(_at_home(value)):
        return _text(value)
    inside = value[1:-1].strip()
    return f"[{','.join(map(_text, _parts(inside)))}]" if inside else "[]"


def _text(value: str) -> str:
    if value.lower() == "null" or re.fullmatch(_QUOTED, value, re.DOTALL):
        return value
    return QuotedString(_at_home(value), Quote.single).with_quotes()


def _at_home(value: str) -> str:
    before = _BEFORE_HOME.match(value)
    start = before.end() if before else 0
    return value[:start] + os.path.expanduser(value[start:])


def _parts(text: str) -> list[str]:
    """Split at commas, except within quotes or within a part that is in brackets."""
    parts, at = [], 0
    while at <= len(text):
        found = _PART.match(text, at)
        assert found is not None  # the pattern also matches empty text
        parts.append(found[0].strip())
        at = found.end() + 1
    return parts


class _LongLived:
    """An output stream that ignores the loss of its reader.

    Standard output to a full disk raises an error once.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._reader():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError) and self is sys.stdout:  # a full disk
                raise OSError(error.errno, error.strerror, self._stream.name) from None


@contextlib.contextmanager
def without_readers() -> Iterator[None]:
    """Within, the loss of a reader is not an error, as in `msn COMMAND | head -1`."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _LongLived(out), _LongLived(err)
    try:
        yield
    finally:
        sys.stdout.flush()  # else it fails with a message at the end of the process
        sys.stdout, sys.stderr = out, err


def in_hydras_grammar(value: Any) -> str:
    """A Python value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return (
            "{" + ",".join(f"{key}:{in_hydras_grammar(item)}" for key, item in value.items()) + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ",".join(_quoted(item) for item in value) + "]"
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    return text if _PLAIN.fullmatch(text) or isinstance(value, os.PathLike) else _quoted(text)


def _quoted(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        return in_hydras_grammar(value)
    return "'" + os.fspath(value).replace("\\", "\\\\").replace("'", "\\'") + "'"
