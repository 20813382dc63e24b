"""`python -m msn COMMAND key=value ...`, also installed as the command `msn`."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

# command -> module below msn.commands, which has run(config) and a config of the command's name
COMMANDS = {
    "train": "train",
    "eval_lowshot": "eval_lowshot",
    "export": "export",
    "verify": "verify",
    "embed": "embed",
    "suggest_labels": "suggest_labels",
    "make_shards": "make_shards",
    "show_views": "show_views",
    "bench": "bench",
    "report": "report",
    "replay": "replay",
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        wish = f"unknown command {name!r}" if name else "no command given"
        print(f"error: {wish}: allowed are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    run_named(name, sys.argv[2:])


def run_named(name: str, arguments: list[str]) -> None:
    """Run a command by its name with Hydra overrides and flags."""
    from msn.commands.entry import run_command

    def job(config: "DictConfig") -> None:
        # Imported after composition: a mistyped key is told at once, without loading torch.
        import_module(f"msn.commands.{COMMANDS[name]}").run(config)

    run_command(name, job, arguments)


if __name__ == "__main__":
    main()
