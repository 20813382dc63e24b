"""README's lines are what CI runs; its snippets and those of docs/ run."""

import re

import pytest
import torch
from PIL import Image

from msn.commands.entry import compose, config_directory
from msn.weights import save_backbone
from msn.weights.classifier import Classifier
from msn.weights.export import export
from tests.conftest import ROOT
from tests.weights.conftest import make_weights

README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", "\n".join(PAGES), re.DOTALL)


def test_the_signals_that_a_run_survives_are_named():
    section = README.partition("## Runs that survive")[2].partition("\n## ")[0]
    assert [
        name for name in ("SIGTERM", "SIGUSR1", "Ctrl-C", "SIGHUP") if name not in section
    ] == []


def test_quick_start_is_two_lines():
    start = re.search(r"<!-- quick start -->(.*?)<!-- /quick start -->", README, re.DOTALL)[1]
    lines = [line for line in start.splitlines() if line.startswith("python -m pip install")]
    assert len(lines) == 2
    assert lines[0].endswith("&& python train.py")
    assert lines[1].endswith("&& pytest -n 2")


@pytest.fixture(scope="module")
def after_a_run(tmp_path_factory):
    """What the README's commands leave: a run, a photograph and two exports."""
    where = tmp_path_factory.mktemp("readme")
    weights = make_weights()
    run = where / "runs" / "digits" / "0"
    save_backbone(
        run / "backbone.safetensors", weights.trunk, weights.meta | {"model": weights.model}
    )
    classes = ("a", "b", "c")
    head = Classifier(torch.randn(3, 32), None, classes, "class_token", True, True)
    settings = {"image_size": None, "overwrite": False, "lowshot": None}
    export(weights, format="timm", out=where / "exported" / "timm", head=None, **settings)
    export(weights, format="huggingface", out=where / "exported" / "hf", head=head, **settings)
    Image.new("RGB", (40, 30), (90, 120, 30)).save(where / "photo.jpg")
    return where


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, marks=pytest.mark.slow) if "msn.pretrain" in code else code
        for language, code in BLOCKS
        if language == "python"
    ],
)
def test_python_snippets_run(code, after_a_run, monkeypatch):
    if "transformers" in code:
        pytest.importorskip("transformers")
    monkeypatch.chdir(after_a_run)
    exec(compile(code, "README.md", "exec"), {})


def commands():
    """Those of code blocks, and those between backticks that begin with `python`."""
    lines = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
    lines += re.findall(r"`(python [^`]*)`", "\n".join(PAGES))
    for line in dict.fromkeys(lines):
        found = re.search(r"(train|eval_lowshot)\.py(.*)|-m msn (\w+)(.*)", line.split("#")[0])
        if found and not re.search(r"pip install| \.\.\.|--multirun", line):
            words = (found[2] or found[4] or "").split()
            of_hydra = ("--", "hydra/")  # its launchers are not installed here
            yield found[1] or found[3], [word for word in words if not word.startswith(of_hydra)]


@pytest.mark.parametrize(("name", "arguments"), list(commands()))
def test_commands_compose(name, arguments):
    assert compose(name, arguments) is not None


def test_every_experiment_is_named():
    keys = (ROOT / "docs" / "keys.md").read_text()
    for path in (config_directory() / "experiment").glob("*.yaml"):
        assert f"`{path.stem}`" in keys, path.stem


def test_files_that_are_named_exist():
    for path in re.findall(r"`((?:tests|msn|docs|benchmarks|configs)/[\w./]+)`", "".join(PAGES)):
        assert (ROOT / path).exists(), path


def test_every_deviation_has_its_reason_its_effect_and_a_test():
    page = (ROOT / "docs" / "deviations.md").read_text()
    table = page.split("## Deviations")[1].split("\n\n")[1].splitlines()
    rows = [line.strip("|").split("|") for line in table[2:]]
    assert len(rows) >= 15
    for row in rows:
        assert len(row) == 4, row
        assert re.search(r"`tests/", row[3]), row
