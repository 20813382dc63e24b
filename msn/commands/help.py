"""What `--help` says: of all commands, and of one of them."""

from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

import yaml

# Files that others are made of, and no options themselves.
_PARTS = {"data": ("base",), "protocol": ("base", "logistic")}

_FLAGS = """Flags:
  --help            this text
  --cfg job         what the command would use; with --resolve resolved, with --package KEY a part
  --multirun        one run for each choice: key=a,b

Paths and names (data.root, checkpoint, init, out, run.name, ...) are taken as they stand after the
=, so quote them for the shell alone: "data.root=~/my photos (1)". null is none; ~ is your home."""


def options(directory: Path, group: str) -> list[str]:
    """Names that may stand after `group=`, sorted.

    Args:
        directory: of the configuration.
        group: a directory in it, for instance `data` or `data/views`.
    """
    names = (path.stem for path in (directory / group).glob("*.yaml"))
    return sorted(name for name in names if name not in _PARTS.get(group, ()))


def usage(commands: Mapping[str, str]) -> str:
    """All commands, a line each.

    Args:
        commands: what each does, by its name.
    """
    width = max(map(len, commands))
    lines = [f"  {name.ljust(width)}  {what}" for name, what in commands.items()]
    head = "usage: python -m msn COMMAND [key=value ...]        also installed as: msn COMMAND ..."
    return "\n".join([head, "", *lines, "", "python -m msn COMMAND --help lists a command's keys"])


def help_text(directory: Path, config_name: str, keys: str | None) -> str:
    """What a command is for, its groups with their default options, its keys, and flags.

    Args:
        directory: of the configuration.
        config_name: the command's file in it, without .yaml.
        keys: its composed configuration in YAML; None where a group must be chosen first.
    """
    lines = (directory / f"{config_name}.yaml").read_text().splitlines()
    text = [line[2:] for line in takewhile(lambda line: line.startswith("# "), lines)]
    groups = _groups(directory, config_name)
    if groups:
        text += ["", "Groups, group=option (an experiment changes several):"]
    for group, default in groups.items():
        given = "must be chosen" if default == "???" else f"{default} unless chosen"
        text.append(f"  {group}=...  {given}; of {', '.join(options(directory, group))}")
    if keys is not None:
        text += ["", "Keys, key=value (group.key=value further in), as they are:"]
        text += [f"  {line}" for line in keys.splitlines()]
    return "\n".join([*text, "", _FLAGS])


def _groups(directory: Path, config_name: str) -> dict[str, str]:
    """Groups of a command, with those of the command it is made of, and their default options."""
    found: dict[str, str] = {}
    content = yaml.safe_load((directory / f"{config_name}.yaml").read_text())
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):
            ((key, option),) = entry.items()
            group = key.removeprefix("override ")
            if not group.startswith("hydra/"):
                found[group] = "none" if option is None else str(option)
        elif entry != "_self_":
            found |= _groups(directory, entry)
    return found
