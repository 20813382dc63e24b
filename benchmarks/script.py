"""How the scripts of this folder read `key=value ...`, write rows to `json=FILE`, tell of mistakes.

A mistake ends in one line and exit code 2, as in the product; MSN_DEBUG=1 shows the traceback.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from msn.commands.bench import keep_rows
from msn.commands.entry import MISTAKES, compose, one_line, to_plain
from msn.errors import UserError

Job = Callable[[dict[str, Any], Console], list[dict[str, Any]]]


def run_script(job: Job, own: Mapping[str, Any], *, what: str | None = None) -> None:
    """Read the settings from the command line, measure, write the rows.

    Args:
        job: gets the settings and where to show tables; returns rows.
        own: the script's own keys with their defaults; `json` is every script's.
        what: part of `msn bench` whose keys the script has, too.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        defaults = " ".join(f"{key}={value}" for key, value in own.items())
        also = f" and the keys of msn bench what={what}" if what else ""
        print(f"usage: python {sys.argv[0]} json=FILE {defaults}{also}")
        return
    try:
        keep_rows(job, read_settings(sys.argv[1:], own, what))
    except MISTAKES as error:
        if os.environ.get("MSN_DEBUG"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def read_settings(arguments: list[str], own: Mapping[str, Any], what: str | None) -> dict[str, Any]:
    """The settings that the arguments make of the defaults.

    Raises:
        UserError: for an unknown key or a value that cannot be read.
    """
    found, others = {"json": None, **own}, []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if key in found and equals:
            read = OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
            found[key] = dict(read)[key]
        elif what is None:
            raise UserError(f"unknown key {key}: allowed are {', '.join(found)}")
        else:
            others.append(argument)
    if what is None:
        return found
    return {**to_plain(compose("bench", [f"what={what}", *others])), **found}
