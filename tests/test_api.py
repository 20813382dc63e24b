"""The commands from Python: results, mistakes, and a process that is left as it was."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import warnings

import lightning.pytorch  # noqa: F401  # sets variables of the environment when it is imported
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

import msn
from msn.commands.command_line import in_hydras_grammar
from msn.commands.entry import config_directory
from tests.commands.conftest import TINY

KEYS = dict(key.split("=", 1) for key in TINY) | {"protocol.shots": [1, 2]}
OF_TABLE = {key: value for key, value in KEYS.items() if key.startswith("protocol")}


def state():
    """What a call may not change."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002  # theirs
    return (
        torch_state.tolist(),
        str(numpy_state),
        random.getstate(),
        dict(os.environ),
        list(warnings.filters),
        torch.are_deterministic_algorithms_enabled(),
        logging.getLogger("lightning.pytorch").level,
        logging.getLogger().handlers[:],
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        os.getcwd(),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("my images, (1)")
    for label in "abc":
        (root / label).mkdir()
        for number in range(8):
            noise = np.random.default_rng(number).integers(0, 255, (36, 40, 3), np.uint8)
            Image.fromarray(noise).save(root / label / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("api") / "a run, with 'quotes' (1)"
    before = state()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        found = msn.pretrain(images, out, **KEYS, **{"data.global_batch_size": 8})
        assert compose("train").seed == 0  # the caller's own Hydra is as it was
    assert state() == before
    return found


def test_a_run_is_what_the_command_leaves(run):
    assert run.path.is_absolute()
    assert run.metrics[-1]["step"] == "2"
    assert run.verdicts[-1]["verdict"] == "warming up"
    assert {row["backbone"] for row in run.table} == {"msn", "random", "pixels", "majority"}
    assert run.table.rows == json.loads((run.path / "lowshot.json").read_text())["rows"]
    assert run.backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 24)
    assert "<th>logistic<br>1 per class</th>" in run._repr_html_()
    assert run._repr_html_().count("<td>majority</td>") == 1
    assert "random" in run._repr_html_()


def test_a_second_run_in_the_same_process_is_equal_to_the_first(run, images, tmp_path, capsys):
    again = msn.pretrain(images, tmp_path / "again", **KEYS, **{"data.global_batch_size": 8})
    assert "run directory" in capsys.readouterr().out
    for (name, ours), theirs in zip(
        run.backbone.state_dict().items(), again.backbone.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_several_backbones_are_evaluated_silently_and_leave_nothing(
    run, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = state()
    table = msn.evaluate({"a": run.path, "b": run.path}, images, **OF_TABLE)
    assert state() == before
    assert list(dict.fromkeys(row["backbone"] for row in table))[:2] == ["a", "b"]
    assert "| a |" in str(table)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    kept = msn.evaluate(run.path, images, out=tmp_path / "kept", **OF_TABLE)
    assert (tmp_path / "kept" / "lowshot.json").is_file()
    assert len(kept) == len(run.table)


def test_a_table_becomes_a_data_frame(run):
    pytest.importorskip("pandas")
    frame = run.table.to_pandas()
    assert len(frame) == len(run.table)
    assert frame["top1_mean"].between(0, 1).all()


def test_the_other_commands_return_what_they_make(run, images, tmp_path):
    features = msn.embed(run.path, images)
    assert features.features.shape == (24, 24)
    assert features.names[0] == "a/0.png"
    assert features.labels == [name[0] for name in features.names]
    kept = features.save(tmp_path / "f.csv")
    again = msn.embed(run.path, images, out=tmp_path / "g.csv")
    assert kept.read_text() == (tmp_path / "g.csv").read_text()
    assert again.features.equal(features.features)
    assert msn.show_views(images, tmp_path / "v.png", experiment="digits").stat().st_size > 1000
    chosen = msn.suggest_labels(run.path, images, tmp_path / "labels", budget=5)
    assert [row["label"] for row in chosen] == [""] * 5
    assert (msn.export(run.path, tmp_path / "timm") / "parity.json").is_file()
    assert run.report(tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: msn.evaluate(run.path, "no such"), "data=no such: no such file or folder"),
        (lambda run: msn.evaluate("nowhere"), "nowhere: no such file"),
        (lambda run: msn.evaluate(run.path, nix=1), "unknown key nix"),
        (lambda run: msn.pretrain(out=run.path), "finished"),
        (lambda run: msn.pretrain(**{"model.depth": 0}), "model.depth"),
        (lambda run: msn.pretrain(plan=True), "plan trains nothing"),
        (lambda run: msn.export(run.path, "x", format="jax"), "format must be one of"),
    ],
)
def test_mistakes_are_exceptions_in_one_line(call, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = state()
    with pytest.raises(msn.UserError, match=message) as error:
        call(run)
    assert "\n" not in str(error.value)
    assert state() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-3, "0.001"),
        ("auto", "auto"),
        ("a b", "'a b'"),
        ([1, None, "x,y"], "[1,null,'x,y']"),
        ({"a": "b'c"}, r"{a:'b\'c'}"),
    ],
)
def test_values_in_the_grammar_of_overrides(value, text):
    assert in_hydras_grammar(value) == text


def test_the_package_is_imported_without_torch():
    code = "import msn, sys; assert 'torch' not in sys.modules; assert 'pretrain' in dir(msn)"
    subprocess.run([sys.executable, "-c", code], check=True)
