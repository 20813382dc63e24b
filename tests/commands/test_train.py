"""`train.py` from a configuration to a result, in this process."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch

from msn.method.vit import VisionTransformer
from msn.weights import read_weights
from tests.commands.conftest import TINY


def run_directory_of(out):
    return re.search(r"run directory: (.*)$", out.strip().splitlines()[-1])[1]


def test_a_run_leaves_a_backbone_a_table_and_its_directory(command, tmp_path):
    code, out, _ = command("train", *TINY, f"run.root={tmp_path}")
    assert code == 0
    directory = tmp_path / "digits" / "0"
    assert run_directory_of(out) == str(directory)
    result = json.loads((directory / "lowshot.json").read_text())
    assert set(result) == {"rows", "config", "versions"}
    rows = {(row["backbone"], row["classifier"], row["labels"]) for row in result["rows"]}
    kinds = [("logistic", "1"), ("logistic", "2"), ("logistic", "5"), ("knn", "all")]
    assert rows == {(name, *kind) for name in ("msn", "random", "pixels") for kind in kinds}
    assert all(0 <= row["top1_mean"] <= 1 for row in result["rows"])
    weights = read_weights(directory / "backbone.safetensors")
    VisionTransformer(**weights.model).load_state_dict(weights.trunk, strict=True)
    with (directory / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["train/loss"]) > 0
    assert float(last["collapse/prototypes_used"]) >= 1
    assert float(last["schedule/lr"]) > 0
    assert (directory / "config.yaml").is_file()
    command("train", *TINY, f"run.root={tmp_path}")
    assert (tmp_path / "digits" / "1" / "lowshot.json").is_file()


def test_two_runs_of_a_seed_give_the_same_weights_and_another_seed_does_not(command, tmp_path):
    states = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        command("train", *TINY, f"run.dir={tmp_path / name}", f"seed={seed}")
        states.append(read_weights(tmp_path / name / "backbone.safetensors").trunk)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["pos_embed"], states[2]["pos_embed"])


def test_a_finished_run_is_refused_and_left_alone(command, tmp_path):
    arguments = [*TINY, f"run.root={tmp_path}", "run.name=one"]
    command("train", *arguments)
    before = (tmp_path / "digits" / "one" / "metrics.csv").read_text()
    code, _, err = command("train", *arguments)
    assert code == 2
    assert "finished run" in err
    assert (tmp_path / "digits" / "one" / "metrics.csv").read_text() == before


def test_any_folder_trains_labelled_or_not(command, tmp_path, images):
    base = [*TINY, "data=folder", "data.global_batch_size=8"]
    code, out, _ = command("train", *base, f"data.root={images}", f"run.dir={tmp_path / 'a'}")
    assert (code, "10-NN" in out) == (0, True)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(images.rglob("*.png")):
        file.rename(flat / f"{i}.png")
    code, out, _ = command("train", *base, f"data.root={flat}", f"run.dir={tmp_path / 'b'}")
    assert (code, "no labels" in out) == (0, True)
    assert not (tmp_path / "b" / "lowshot.json").exists()


def test_pretraining_starts_from_a_backbone(command, tmp_path):
    command("train", *TINY, f"run.dir={tmp_path / 'a'}")
    init = f"init={tmp_path / 'a' / 'backbone.safetensors'}"
    slow = ["method.lr=1e-12", "method.start_lr=0", "method.final_lr=0"]
    code, out, _ = command("train", *TINY, *slow, f"run.dir={tmp_path / 'b'}", init)
    assert code == 0
    assert "starting from" in out
    first, second = (read_weights(tmp_path / n / "backbone.safetensors").trunk for n in "ab")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_other_loggers_write_beside_the_csv(command, tmp_path, monkeypatch, logger):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    code, _, err = command("train", *TINY, f"run.dir={tmp_path / 'run'}", f"logger={logger}")
    assert code == 0, err
    files = [path.name for path in (tmp_path / "run").rglob("*")]
    assert "metrics.csv" in files
    wanted = {"wandb": "offline-run", "tensorboard": "events.out"}[logger]
    assert any(name.startswith(wanted) for name in files)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_default_run_meets_its_claim(command, tmp_path):
    """README says 91 % and 97 %; 1-shot (77 %) has too wide a spread over runs for a bound here."""
    run = os.environ.get("MSN_DEFAULT_RUN")  # of a `python train.py` that has just been made
    if run is None:
        run = str(tmp_path / "run")
        assert command("train", f"run.dir={run}")[0] == 0
    rows = json.loads((Path(run) / "lowshot.json").read_text())["rows"]
    top1 = {(row["backbone"], row["labels"]): row["top1_mean"] for row in rows}
    assert top1["msn", "5"] >= 0.88
    assert top1["msn", "all"] >= 0.95
    assert top1["msn", "5"] > top1["pixels", "5"]
    assert top1["msn", "1"] > top1["pixels", "1"]


def test_eval_lowshot_repeats_the_table_of_the_run(command, tmp_path):
    command("train", *TINY, f"run.dir={tmp_path / 'run'}")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    code, out, _ = command(
        "eval_lowshot",
        f"checkpoint=[msn:{tmp_path / 'run'},again:{checkpoint}]",
        "protocol.splits=2",
        "model.num_heads=3",
        f"run.dir={tmp_path / 'eval'}",
    )
    assert code == 0
    assert run_directory_of(out) == str(tmp_path / "eval")
    first, second = (
        json.loads((tmp_path / name / "lowshot.json").read_text())["rows"]
        for name in ("run", "eval")
    )
    figures = {(row["backbone"], row["labels"]): row["top1_mean"] for row in first}
    for row in second:
        name = "msn" if row["backbone"] == "again" else row["backbone"]
        assert row["top1_mean"] == figures[name, row["labels"]]
