"""`python -m msn COMMAND key=value ...`, also installed as the command `msn`."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from msn import __version__

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What each command does. It has a module below msn.commands, with run(config), and a configuration
# file of its name.
COMMANDS = {
    "train": "pretrain, export the backbone, print its low-shot table",
    "eval_lowshot": "label few images and measure any backbone with them",
    "export": "turn a checkpoint into a timm, Hugging Face, torch, ONNX or official model",
    "verify": "replay the reference's figures on this machine",
    "embed": "features of a folder of images, with their names",
    "suggest_labels": "which images to label first",
    "predict": "from some labels to the class and probability of all other images",
    "rank": "measure checkpoints without labels (this does not replace a few labels)",
    "make_shards": "pack a folder of images into tar shards",
    "show_views": "draw what the networks would see of your images",
    "show_reconstruction": "draw what a masked autoencoder makes of your images",
    "bench": "measure training on this machine: the step, files to views, what limits",
    "report": "a page for a browser on a run, or on several side by side",
    "replay": "take a step that was not finite again, from its dump",
}

INTERRUPTED = 130  # exit code after Ctrl-C, 128 + SIGINT as shells have it


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(_usage())
    elif name == "--version":
        print(f"msn {__version__}")
    elif name in COMMANDS:
        run_named(name, sys.argv[2:])
    else:
        problem = f"unknown command {name!r}" if name else "no command given"
        print(f"error: {problem}: allowed are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def _usage() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()]
    head = "usage: python -m msn COMMAND [key=value ...]        also installed as: msn COMMAND ..."
    return "\n".join([head, "", *lines, "", "python -m msn COMMAND --help lists a command's keys"])


def run_named(name: str, arguments: list[str]) -> None:
    """Run a command by its name with Hydra overrides and flags; Ctrl-C ends it with code 130."""
    if "--version" in arguments:  # Hydra would print its own
        print(f"msn {__version__}")
        return

    def job(config: "DictConfig") -> None:
        # Imported after composition: a mistyped key is told at once, without loading torch.
        import_module(f"msn.commands.{name}").run(config)

    try:
        from msn.commands.entry import run_command  # takes half a second, in which Ctrl-C may come

        run_command(name, job, arguments)
    except KeyboardInterrupt as error:  # Ctrl-C; a command may have said what is left of its work
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
