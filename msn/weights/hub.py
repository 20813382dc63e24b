"""The Hugging Face Hub, both ways: read `hf://USER/NAME[@REVISION]`, push an export.

Only safetensors and plain data are fetched. They stay in the Hub's own cache and can be read again
without a network (`HF_HUB_OFFLINE=1`).
"""

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from msn.errors import UserError, brief
from msn.weights.weights import BASELINES

PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FETCHED = ("*.safetensors", "*.json", "*.yaml", "README.md")


def local_path(path: str | Path) -> Path:
    """The path itself, or for `hf://` the directory into which the repository was fetched.

    Raises:
        UserError: the address is wrong, huggingface-hub is not installed, or the repository cannot
            be fetched: no network, no token, or no such repository.
    """
    text = str(path)
    if not text.startswith("hf:/"):  # one slash: a path that was normalised
        return Path(path)
    text = PREFIX + text.removeprefix("hf:").lstrip("/")
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise UserError(f"{text}: must be {PREFIX}USER/NAME or {PREFIX}USER/NAME@REVISION")
    name, revision = found.groups()
    hub = _hub(text)
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_FETCHED))
    except Exception as error:  # of the network: anything
        raise UserError(
            f"{text}: cannot be fetched from the Hub ({brief(error)}){_HINT}"
        ) from error


def check_push(name: Any) -> str:
    """The repository that `push` names; fails before anything is written.

    Raises:
        UserError: the name is not one, or there is no token.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"push={name}: must be USER/NAME")
    if _hub(f"push={name}").get_token() is None:
        raise UserError(f"push={name}: no token: run `hf auth login` or set HF_TOKEN")
    return name


def push(directory: Path, name: str, *, private: bool) -> str:
    """Upload an export.

    Args:
        directory: the export.
        name: USER/NAME; the repository is created if it does not exist.
        private: whether a new repository is private.

    Returns:
        Its address.

    Raises:
        UserError: the Hub refuses it; the export stays.
    """
    hub = _hub(f"push={name}")
    try:
        api = hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="Export by msn")
    except Exception as error:  # of the network: anything
        raise UserError(
            f"push={name}: the Hub refuses it ({brief(error)}); the export is in {directory}"
        ) from error
    return str(address)


def model_index(name: str, rows: Sequence[Mapping[str, Any]], data: str) -> list[str]:
    """Lines of a card's front matter with low-shot accuracies, in the Hub's form.

    Args:
        name: of the model.
        rows: of lowshot.json; those of baselines are left out.
        data: what they were measured on.
    """
    own = [row for row in rows if row["backbone"] not in BASELINES]
    if not own:
        return []
    lines = ["model-index:", f"- name: {name}", "  results:"]
    for row in own:
        labels = f"{row['labels']} labels per class"
        labels = "all labels" if row["labels"] == "all" else labels
        labels = labels.replace("% labels per class", "% of the labels")
        top1 = f"top-1, {row['classifier']}, {labels}"
        lines += [
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {_quoted(data)}, type: {_quoted(data)}}}",
            "    metrics:",
            "    - type: accuracy",
            f"      name: {_quoted(top1)}",
            f"      value: {row['top1_mean']:.4f}",
        ]
    return lines


_HINT = (
    "; a private one needs `hf auth login` or HF_TOKEN; HF_HUB_OFFLINE=1 reads what was fetched "
    "before"
)


def _hub(what: str) -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(f"{what}: needs `pip install 'msn-pretraining[hf]'` ({error})") from error


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
