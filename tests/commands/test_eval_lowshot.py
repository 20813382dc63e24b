"""`eval_lowshot.py`: every kind of backbone in one table, the same digits however it is run."""

import json
import math
import os
import re
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image

from msn.commands import eval_lowshot
from msn.commands.entry import build, compose
from msn.commands.eval_lowshot import (
    cache_directory,
    check_baselines,
    choose_device,
    choose_devices,
    without_views,
)
from msn.weights import read_weights, save_backbone
from msn.weights.export import export
from msn.weights.weights import trunk_digest
from tests.commands.conftest import no_reader
from tests.conftest import ROOT
from tests.weights.builders import MODEL, make_trunk

SMALL = ["data=folder", "protocol.shots=[1,2]", "protocol.splits=2", "protocol.knn_neighbours=3"]


@pytest.fixture
def run(tmp_path):
    """A run directory with nothing but its backbone."""
    trunk = make_trunk()
    save_backbone(tmp_path / "run" / "backbone.safetensors", trunk.state_dict(), {"model": MODEL})
    return tmp_path / "run"


def rows_of(directory):
    return json.loads((directory / "lowshot.json").read_text())["rows"]


@pytest.mark.slow
def test_files_of_five_libraries_make_one_table_and_one_curve(command, tmp_path, images, run):
    pytest.importorskip("transformers")
    weights = read_weights(run)
    backbones = [f"ours:{run}"]
    for format in ("timm", "huggingface", "official", "torch"):
        out = tmp_path / format
        export(
            weights,
            format=format,
            out=out,
            head=None,
            image_size=None,
            overwrite=False,
            lowshot=None,
        )
        backbones.append(f"{format}:{out / 'msn.pth.tar' if format == 'official' else out}")
    code, out, _ = command(
        "eval_lowshot",
        f"checkpoint=[{','.join(backbones)}]",
        f"model.num_heads={MODEL['num_heads']}",
        f"data.root={images}",
        f"run.dir={tmp_path / 'out'}",
        *SMALL,
    )
    assert code == 0
    rows = rows_of(tmp_path / "out")
    tables = {}
    for row in rows:
        tables.setdefault(row["backbone"], []).append((row["labels"], row["top1"]))
    names = [name.partition(":")[0] for name in backbones]
    assert list(tables) == [*names, "random", "pixels", "majority"]
    assert all(tables[name] == tables["ours"] for name in names)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"lowshot.{end}" for end in ("json", "csv", "md", "png", "svg")} <= found
    assert Image.open(tmp_path / "out" / "lowshot.png").size[0] > 300
    assert out.splitlines()[-1] == f"run directory: {tmp_path / 'out'}"


def test_features_of_another_folder_with_the_same_names_are_not_taken_over(
    command, tmp_path, images, run
):
    """The cache is on by default: it has to see that the images are others."""
    arguments = [f"checkpoint={run}", f"cache_dir={tmp_path / 'cache'}", "baselines=[]", *SMALL]
    first = command("eval_lowshot", *arguments, f"data.root={images}", f"run.dir={tmp_path / 'a'}")
    assert first[0] == 0
    for path in images.rglob("*.png"):  # every class looks alike now
        Image.new("RGB", (40, 36), (int(path.stem) * 9, 5, 5)).save(path)
    assert command(
        "eval_lowshot", *arguments, f"data.root={images}", f"run.dir={tmp_path / 'b'}"
    )[0] == 0  # fmt: skip
    fresh = [f"checkpoint={run}", "cache_dir=null", "baselines=[]", *SMALL]
    command("eval_lowshot", *fresh, f"data.root={images}", f"run.dir={tmp_path / 'c'}")
    before, after, expected = ([r["top1"] for r in rows_of(tmp_path / d)] for d in "abc")
    assert after == expected != before


@pytest.mark.slow
def test_a_table_in_wandb_offline(command, tmp_path, images, run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, _, err = command(
        "eval_lowshot", f"checkpoint={run}", "baselines=[]", "logger=wandb", f"data.root={images}",
        f"run.dir={tmp_path / 'out'}", *SMALL,
    )  # fmt: skip
    assert code == 0, err
    (log,) = (tmp_path / "out").rglob("*.wandb")
    assert b"lowshot/msn/logistic/1" in log.read_bytes()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path, images, run):
    arguments = [
        str(ROOT / "eval_lowshot.py"), f"checkpoint={run}", "baselines=[]", "cache_dir=null",
        f"data.root={images}", *SMALL,
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    tables = []
    for name, launcher in (("one", []), ("two", torchrun)):
        where = tmp_path / name
        done = subprocess.run(
            [sys.executable, *launcher, *arguments, f"run.dir={where}"],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(re.findall("run directory: ", done.stdout)) == 1
        tables.append([(row["labels"], row["top1"]) for row in rows_of(where)])
    assert tables[0] == tables[1]


def test_nan_features_and_single_classes_are_one_line(command, tmp_path, images, run):
    trunk = make_trunk()
    with torch.no_grad():
        trunk.cls_token.fill_(3e38)
        trunk.blocks[0].mlp.fc2.bias.fill_(3e38)
    save_backbone(tmp_path / "nan.safetensors", trunk.state_dict(), {"model": MODEL})
    where = tmp_path / "out"
    tail = [f"run.dir={where}", "baselines=[]", *SMALL]
    for message, *arguments in (
        (
            "hold NaN or infinity",
            f"checkpoint={tmp_path / 'nan.safetensors'}",
            f"data.root={images}",
        ),
        (
            "class0 has no labels, which low-shot evaluation needs: all images lie in the folder",
            f"checkpoint={run}",
            f"data.root={images / 'class0'}",
        ),
        ("class", f"checkpoint={run}", f"data.root={images}", "protocol.shots=[50]"),
        ("30", f"checkpoint={run}", f"data.root={images}", "protocol.features.image_size=30"),
    ):
        code, _, err = command("eval_lowshot", *tail, *arguments)
        assert code == 2, (message, err)
        (line,) = err.strip().splitlines()
        assert message in line
        assert not where.exists()


def test_cuda_without_a_number_stands_for_all_gpus_or_the_process_s_own(monkeypatch):
    empty = torch.empty

    def allocate(*shape, device="cpu"):  # as on a machine with GPUs: the index is filled in
        return empty(*shape, device="meta" if device == "cuda" else device)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device("cuda") == torch.device("cuda")
    assert choose_devices("cuda", 1) == (torch.device("cuda", 0), torch.device("cuda", 1))
    assert choose_devices("cuda", 2) == (torch.device("cuda", 1),)


def test_features_are_kept_where_msn_cache_dir_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MSN_CACHE_DIR", str(tmp_path))
    assert cache_directory("auto") == tmp_path / "features"
    assert cache_directory(None) is None


@pytest.mark.parametrize(
    ("protocol", "names"),
    [
        ("kshot", ["random", "pixels", "majority"]),
        ("imagenet_lowshot", ["random", "majority"]),
        ("finetune", ["majority"]),
    ],
)
def test_protocols_that_cost_much_have_fewer_baselines(protocol, names):
    config = without_views(compose("eval_lowshot", [f"protocol={protocol}", "checkpoint=x"]))
    built = build(config, "protocol")
    assert check_baselines(config.baselines, built) == names
    assert check_baselines(["pixels"], built) == ["pixels"]


def test_a_missing_login_of_wandb_is_told_before_the_work(
    command, tmp_path, images, run, monkeypatch
):
    wandb = pytest.importorskip("wandb")

    def init(**settings):
        raise wandb.errors.UsageError("api_key not configured (no-tty).\nCall wandb.login")

    def worked(*arguments, **more):
        raise AssertionError("features were extracted first")

    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(eval_lowshot, "evaluate", worked)
    arguments = [f"checkpoint={run}", "logger=wandb", f"data.root={images}", *SMALL]
    code, _, err = command("eval_lowshot", *arguments, f"run.dir={tmp_path / 'out'}")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert "logger=wandb: api_key not configured" in line
    assert not (tmp_path / "out").exists()


def test_a_numbered_run_is_finished_before_it_is_logged(
    command, tmp_path, images, run, monkeypatch
):
    wandb = pytest.importorskip("wandb")

    silent = MagicMock(id="x")
    silent.log.side_effect = OSError("no answer")
    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.setattr(wandb, "init", lambda **settings: silent)
    arguments = [f"checkpoint={run}", "baselines=[]", "logger=wandb", f"data.root={images}", *SMALL]
    code, _, err = command("eval_lowshot", *arguments, f"run.root={tmp_path / 'runs'}")
    assert code == 2, err
    where = tmp_path / "runs" / "eval_lowshot" / "0"
    assert json.loads((where / "run.json").read_text())["status"] == "finished"
    assert len(rows_of(where)) == 5


def test_a_failed_evaluation_closes_its_run_of_wandb(command, tmp_path, images, run, monkeypatch):
    wandb = pytest.importorskip("wandb")
    ended = []

    begun = MagicMock(id="x")
    begun.finish = lambda exit_code: ended.append((exit_code, (tmp_path / "out").is_dir()))

    def fails(*arguments, **more):
        raise OSError("no")

    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.setattr(wandb, "init", lambda **settings: begun)
    monkeypatch.setattr(eval_lowshot, "evaluate", fails)
    arguments = [f"checkpoint={run}", "logger=wandb", f"data.root={images}", *SMALL]
    assert command("eval_lowshot", *arguments, f"run.dir={tmp_path / 'out'}")[0] == 2
    assert ended == [(1, True)]
    assert not (tmp_path / "out").exists()


def test_a_key_chooses_the_half_of_a_file_here_and_in_training(command, tmp_path, images):
    halves = {"model": make_trunk(), "model_ema": make_trunk(1)}
    torch.save({name: trunk.state_dict() for name, trunk in halves.items()}, tmp_path / "a.pth")
    heads, where = f"model.num_heads={MODEL['num_heads']}", tmp_path / "out"
    evaluate = ["eval_lowshot", f"run.dir={where}", f"data.root={images}", "baselines=[]", *SMALL]
    evaluate += [f"checkpoint={tmp_path / 'a.pth'}", "cache_dir=null", heads]
    code, _, err = command(*evaluate)
    assert code == 2
    assert "holds several backbones, model, model_ema: init_key=NAME chooses one" in err
    assert command(*evaluate, "init_key=model_ema")[0] == 0
    weights = read_weights(tmp_path / "a.pth", num_heads=3, key="model_ema")
    (digest,) = {row["weights"] for row in rows_of(where)}
    assert digest == trunk_digest(weights.trunk)
    sizes = [f"model.{name}={value}" for name, value in MODEL.items() if name != "num_heads"]
    train = ["train", f"init={tmp_path / 'a.pth'}", f"run.dir={tmp_path / 'run'}", heads, *sizes]
    train += ["data=folder", f"data.root={images}", "data.global_batch_size=8"]
    train += ["trainer.accelerator=cpu", "report=false"]
    code, _, err = command(*train)
    assert (code, err.count("init_key=NAME chooses one")) == (2, 1), err
    assert not (tmp_path / "run").exists()
    halves["model_ema"].norm.bias.data[0] = math.nan
    torch.save({"net": halves["model_ema"].state_dict()}, tmp_path / "a.pth")
    code, _, err = command(*train, "init_key=net")
    assert (code, "norm.bias holds NaN or infinity" in err) == (2, True)


def test_of_several_checkpoints_each_has_its_key(command, tmp_path, images):
    halves = {"model": make_trunk(), "model_ema": make_trunk(1)}
    torch.save({name: trunk.state_dict() for name, trunk in halves.items()}, tmp_path / "a.pth")
    torch.save(halves["model"].state_dict(), tmp_path / "flat.pth")
    arguments = [f"model.num_heads={MODEL['num_heads']}", f"data.root={images}", "baselines=[]"]
    arguments += [*SMALL, f"run.dir={tmp_path / 'out'}", "cache_dir=null"]
    code, _, err = command(
        "eval_lowshot", f"checkpoint={tmp_path / 'flat.pth'}", "init_key=net", *arguments
    )
    assert (code, "init_key=net: the file holds one backbone, without a name" in err) == (2, True)
    both = f"checkpoint=[2024_05:{tmp_path / 'a.pth'},b:{tmp_path / 'a.pth'}]"
    code, _, err = command(
        "eval_lowshot", both, "init_key={2024_05:model, b:model_ema}", *arguments
    )
    assert code == 0, err
    found = {row["backbone"]: row["weights"] for row in rows_of(tmp_path / "out")}
    expected = {"2024_05": halves["model"], "b": halves["model_ema"]}
    assert found == {name: trunk_digest(trunk.state_dict()) for name, trunk in expected.items()}


def test_results_do_not_need_a_reader(command, tmp_path, images, run):
    arguments = [f"checkpoint={run}", "baselines=[]", f"data.root={images}", *SMALL]
    with no_reader():
        assert command("eval_lowshot", *arguments, f"run.dir={tmp_path / 'out'}")[0] == 0
    assert len(rows_of(tmp_path / "out")) == 5


def test_results_are_there_before_they_are_printed(tmp_path, monkeypatch):
    def prints(results, title):
        assert (tmp_path / "lowshot.json").is_file()
        raise OSError(title)

    monkeypatch.setattr(eval_lowshot, "print_table", prints)
    with pytest.raises(OSError, match="labels from 3 images, 2 held out"):
        eval_lowshot.write_table(tmp_path, [], (range(3), range(2)), {})


def test_a_run_directory_in_use_is_refused_before_the_work(
    command, tmp_path, images, run, monkeypatch
):
    monkeypatch.setattr(eval_lowshot, "open_backbones", None)
    where = tmp_path / "out"
    where.mkdir()
    holds = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{holds}; print(flush=True); sys.stdin.read()", where / "run.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    code, _, err = command("eval_lowshot", f"checkpoint={run}", f"run.dir={where}")
    holder.communicate()
    assert (code, f"{where} is in use by" in err) == (2, True), err


def test_an_evaluation_that_fails_leaves_nothing(command, tmp_path, images, run, monkeypatch):
    def fails(*arguments, **more):
        assert (tmp_path / "runs" / "eval_lowshot" / "0" / "run.lock").is_file()
        raise OSError("no")

    monkeypatch.setattr(eval_lowshot, "evaluate", fails)
    arguments = [f"checkpoint={run}", f"data.root={images}", *SMALL]
    assert command("eval_lowshot", *arguments, f"run.root={tmp_path / 'runs'}")[0] == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["eval_lowshot", "export", "embed", "suggest_labels"])
def test_heads_against_the_file_s_word_are_one_line(command, tmp_path, images, run, name):
    arguments = {
        "eval_lowshot": [f"data.root={images}", f"run.root={tmp_path / 'out'}", *SMALL],
        "export": ["format=timm", f"out={tmp_path / 'out'}"],
        "embed": [f"data.root={images}", f"out={tmp_path / 'out.safetensors'}"],
        "suggest_labels": [f"data.root={images}", "budget=1", f"out={tmp_path / 'out'}"],
    }
    code, _, err = command(name, f"checkpoint={run}", "model.num_heads=5", *arguments[name])
    assert (code, f"itself says {MODEL['num_heads']} attention heads" in err) == (2, True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run"]
