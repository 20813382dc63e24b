"""Bad input ends in one clear line and exit code 2, and leaves nothing behind."""

import contextlib
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from safetensors.torch import save_file

from msn.__main__ import run_named
from msn.commands import run_directory
from msn.commands.entry import MISTAKES, compose, one_line, run_command
from msn.commands.train import run as train
from msn.data.datamodule import MSNDataModule
from msn.method.vit import VisionTransformer
from tests.commands.conftest import TINY, no_reader

# Found while the command line is read.
COMMAND_LINES = {
    "trainer.max_epoch=3": "unknown key trainer.max_epoch: allowed are",
    "data=digit": "data=digit: allowed are cifar10, cifar100, digits, folder",
    "data=base": "data=base: allowed are cifar10",
    "+typo=1": "unknown key typo: allowed are",
    "method.head={a:1}": "unknown key method.head.a: allowed are hidden_dim, output_dim",
    "method.betas.7=0.5": "method.betas.7=0.5: list index out of range",
    "~typo": "no key can be left out",
    "seed=1,2": "--multirun runs one after another",
    "what=all": "unknown key what: allowed are",
    "logger._target_=[]": "unknown key logger._target_: allowed are none here",
    "+method.typo=1": "unknown key method.typo: allowed are",
    "+trainer.typo=1": "unknown key trainer.typo: allowed are",
    "+data.views.foo=1": "unknown key data.views.foo: allowed are",
    "~method.lr": "method.lr would be missing",
    "~model.depth": "model.depth would be missing",
    "~callbacks.preemption": "callbacks.preemption would be missing",
    "~run.root": "run.root would be missing",
    "method=null": "method=null: allowed are mae, msn, msn_no_sinkhorn, pmsn",
    "logger=null": "allowed are csv, mlflow, tensorboard, wandb",
    "experiment=null": "allowed are adapt, digits",
    "data=3": "data=3: allowed are",
    "resume=foo": "resume=foo: allowed are auto, never",
    "trainer.max_epochs=[": "trainer.max_epochs=[: cannot be read as key=value",
    "data.root": "data.root: cannot be read as key=value",
    "run=1": "run must be a group of keys, got 1",
    "run=null": "run must be a group of keys, got None",
    "callbacks=[1]": "callbacks=[1]: allowed are default",
    "data=digits,folder": "--multirun runs one after another",
    "data=": "data=: allowed are cifar10",
    "run.name=a\0b": "run.name: a value cannot contain a null byte",
    "--resolve": "--resolve and --package go with --cfg job",
    "--shell-completion": "unrecognized arguments: --shell-completion",
    "--foo": "unrecognized arguments: --foo",
    "--cfg=foo": "invalid choice: 'foo'",
}

# Found before anything is trained; no directory is made.
SETTINGS = [
    ("method.lr", "abc", "method.lr must be a finite number, got 'abc'"),
    ("method.lr", math.inf, "method.lr must be a finite number"),
    ("method.lr", 1e308, "method.lr must be a finite number"),
    ("method.me_max_weight", math.inf, "must be a finite number"),
    ("method.temperature", math.inf, "must be a finite number"),
    ("method.schedule_stretch", math.inf, "must be a finite number"),
    ("method.warmup_epochs", math.inf, "must be a finite number"),
    ("method.warmup_epochs", 500, "does not fit a training of 1 epochs"),
    ("method.eps", 0, "method.eps must be > 0"),
    ("method.eps", "abc", "method.eps must be a finite number"),
    ("method.betas", [0.9, 1.0], "method.betas must be two numbers in [0, 1)"),
    ("method.betas", [0.9], "method.betas must be two numbers"),
    ("method.patch_drop", 1.0, "method.patch_drop=1.0: must be in [0, 1)"),
    ("method.patch_drop", 0.95, "leaves none of 16 patches"),
    ("method.patch_drop_scope", "x", "must be one of batch, image"),
    ("method.head", None, "method.head must be a group of keys"),
    ("method.head", 5, "method.head must be a group of keys"),
    ("method", None, "module.method must be a group of keys"),
    ("protocol", None, "protocol must be a group of keys"),
    ("data._target_", [], "data._target_=[]: must name a class or a function"),
    ("module._target_", 1, "module._target_=1: must name a class or a function"),
    ("protocol._target_", "math.pi", "protocol._target_=math.pi: must name a class or a function"),
    ("callbacks.probe._target_", "msn.errors", "must name a class or a function"),
    ("callbacks.preemption", {"_target_": "builtins.dict"}, "does not make a Preemption"),
    ("baselines", 1, "baselines must be a list of random, pixels, majority, or auto, got 1"),
    (
        "baselines",
        [[1]],
        "baselines must be a list of random, pixels, majority, or auto, got [[1]]",
    ),
    ("protocol.shots", [1, 500], "images to label"),
    ("model.img_size", 30, "multiple of the patch size 8"),
    ("data.views.rand_size", 30, "multiple of the patch size 8"),
    ("data.views.patch_size", 4, "data.views.patch_size=4: must be model.patch_size=8"),
    ("data.views.brightness", math.inf, "data.views.brightness must be a finite number"),
    ("data.views.ratio", [0.5, math.inf], "data.views.ratio must be a list of finite numbers"),
    ("data.views.blur_radius", [0, math.inf], "must be a list of finite numbers"),
    ("data.image_size", 0, "data.image_size=0: must be"),
    ("data.prefetch_batches", 0, "data.prefetch_batches=0: must be in [1, 1000]"),
    ("data.split_seed", -1, "data.split_seed=-1: must be in [0, 2^32)"),
    ("data.val_root", "x", "digits have no val_root"),
    ("data.download", True, "data.download=true: only"),
    ("data.global_batch_size", 2000, "larger than the training set"),
    ("trainer.max_epochs", "abc", "trainer.max_epochs must be a whole number"),
    ("trainer.max_epochs", 0, "trainer.max_epochs must be >= 1"),
    ("trainer.devices", "abc", "trainer.devices=abc: must be auto"),
    ("trainer.num_nodes", 0, "trainer.num_nodes must be >= 1"),
    ("trainer.limit_train_batches", 0.5, "trainer.limit_train_batches must be a whole number"),
    ("trainer.limit_train_batches", 0, "trainer.limit_train_batches must be >= 1"),
    ("trainer.accumulate_grad_batches", 2, "chunk_size=N"),
    ("method.bf16_stream", True, "method.bf16_stream=true is for trainer.precision=bf16-mixed"),
    ("method.bf16_stream", 1, "method.bf16_stream must be true or false, got 1"),
    ("trainer.precision", "8", "trainer.precision must be"),
    ("trainer.precision", "16-mixed", "trainer.precision must be"),
    ("trainer.precision", "bf16-true", "trainer.precision must be"),
    ("callbacks.probe", None, "callbacks.probe must be a group of keys"),
    ("callbacks.probe.references", 0, "callbacks.probe.references=0: must be >= 1"),
    ("resume.mode", "foo", "resume.mode=foo: must be one of auto, never"),
    ("resume.force", "no", "resume.force must be true or false"),
    ("report", 3, "report must be true or false"),
    ("run.dir", [1], "run.dir must be text"),
    ("seed", -1, "seed must be a whole number"),
    ("init", "/no/such/file", "/no/such/file"),
    # Found only after training, or never, once.
    ("data.global_batch_size", 1, "data.global_batch_size=1: BatchNorm"),
    ("protocol.features.feature", "last_99", "feature=last_99: this backbone has 2 blocks"),
    ("protocol.features.image_size", 31, "image_size=31: must be a multiple of 8"),
    ("protocol.features.image_size", 8000, "a batch of 256 images would have more than"),
    ("protocol.splits", 10**8, "protocol.splits must be in [1, 10000]"),
    ("protocol.seed", -1, "protocol.seed must be in [0, 2^32)"),
    ("method.sinkhorn_iterations", 10**8, "method.sinkhorn_iterations must be in [1, 1000]"),
    ("method.num_prototypes", 10**12, "lower method.num_prototypes=1000000000000, or take"),
    ("method.num_prototypes", 10**18, "too large"),
    ("model.embed_dim", 3 * 10**6, "lower model.embed_dim"),
    ("model.mlp_ratio", 1e30, "too large"),
    ("model.depth", 10**6, "model.depth must be at most 1,000 blocks"),
    ("model.img_size", 8 * 10**5, "GiB and there are"),
    ("data.views.rand_views", 10**6, "lower the number or size of data.views"),
    ("data.views.focal_size", 8 * 10**5, "GiB and there are"),
    ("data.image_size", 10**5, "data.image_size=100000: must be a whole number in [1, 512]"),
    ("data.split_seed", 10**22, "data.split_seed must be a whole number of less than 19 digits"),
    ("data.num_workers", 10**4, "data.num_workers=10000: at most"),
    ("data.prefetch_batches", 10**9, "data.prefetch_batches=1000000000: must be in [1, 1000]"),
]


@pytest.fixture(scope="module")
def tiny():
    return compose("train", TINY)


def one_line_of(err):
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("argument", COMMAND_LINES)
def test_command_lines_that_cannot_be_read(command, tmp_path, argument):
    code, _, err = command("train", f"run.root={tmp_path / 'runs'}", argument)
    assert code == 2
    assert COMMAND_LINES[argument] in one_line_of(err)
    assert not (tmp_path / "runs").exists()


def test_a_sweep_of_which_no_run_could_start_makes_nothing(command, tmp_path):
    given = ["--multirun", f"run.root={tmp_path / 'runs'}", "seed=1,2"]
    code, _, err = command("train", *given, "+typo=1")
    assert (code, "unknown key typo: allowed are" in one_line_of(err)) == (2, True)
    code, _, err = command("train", *given, "logger=csv,nope")
    assert (code, "logger=csv,nope: allowed are csv" in one_line_of(err)) == (2, True)
    assert not (tmp_path / "runs").exists()


def refused(config, changes):
    """The line in which a training with these settings ends."""
    changed = OmegaConf.create(OmegaConf.to_container(config))
    for key, value in changes.items():
        OmegaConf.update(changed, key, value, merge=False)
    with pytest.raises(MISTAKES) as error:
        train(changed)
    return one_line(error.value)


@pytest.mark.parametrize(("key", "value", "message"), SETTINGS)
def test_settings_that_cannot_be(tiny, tmp_path, key, value, message):
    assert message in refused(tiny, {"run.root": str(tmp_path / "runs"), key: value})
    assert not (tmp_path / "runs").exists()


def test_a_wrong_setting_at_the_command_line_is_one_line(command, tmp_path):
    arguments = ["method.temperature=inf", f"run.dir={tmp_path / 'run'}"]
    code, _, err = command("train", *TINY, *arguments)
    assert code == 2
    assert "method.temperature must be a finite number, got inf" in one_line_of(err)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_over_processes(tiny):
    changes = {"data.global_batch_size": 127, "trainer.devices": 2}
    assert "divisible" in refused(tiny, changes)


def test_an_optional_logger_that_is_not_installed(tiny, tmp_path, monkeypatch):
    def absent(*arguments, **settings):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")

    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger.__init__", absent)
    logger = compose("train", ["logger=tensorboard"]).logger
    message = refused(tiny, {"logger": logger, "run.root": str(tmp_path / "runs")})
    assert 'python -m pip install "msn-pretraining[tensorboard]"' in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("at", ["start", "settings"])
def test_a_server_of_a_logger_that_does_not_answer(tiny, tmp_path, monkeypatch, at):
    class Unreachable(CSVLogger):
        def __init__(self, *, experiment_name, run_name, tracking_uri, save_dir):
            super().__init__(save_dir)
            if at == "start":
                raise ConnectionError("no server")

        def log_hyperparams(self, params):
            raise ConnectionError("no server")

    monkeypatch.setattr("lightning.pytorch.loggers.MLFlowLogger", Unreachable)
    logger = compose("train", ["logger=mlflow"]).logger
    message = refused(tiny, {"logger": logger, "run.root": str(tmp_path / "runs")})
    assert message == f"{'logger.mlflow' if at == 'start' else 'Unreachable'}: no server"


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (["protocol=imagenet_lowshot"], "cannot fetch file:///no/such/"),
        (
            ["protocol=imagenet_lowshot", "protocol.lists_dir=/no/such"],
            "there is no such directory",
        ),
        (["protocol.lists=[/no/such.txt]"], "/no/such.txt: cannot read this list"),
    ],
)
def test_lists_of_labels_are_wanted_before_anything_is_trained(
    tiny, tmp_path, monkeypatch, protocol, message
):
    monkeypatch.setenv("MSN_SUBSETS_URL", "file:///no/such")
    monkeypatch.setenv("MSN_CACHE_DIR", str(tmp_path / "cache"))
    changes = {"protocol": compose("train", protocol).protocol}
    assert message in refused(tiny, {**changes, "run.root": str(tmp_path / "runs")})
    assert list(tmp_path.iterdir()) == []


def test_names_of_runs_may_be_numbers(tmp_path):
    run = {"root": str(tmp_path), "experiment": 7, "name": 3, "dir": None}
    config = OmegaConf.create({"run": run, "resume": {"mode": "auto"}})
    assert run_directory.choose_run_directory(config).path == tmp_path / "7" / "3"


def test_two_runs_at_a_time_get_two_numbers(tmp_path):
    run = {"root": str(tmp_path / "runs"), "experiment": "x", "name": None, "dir": None}
    config = OmegaConf.create({"run": run, "resume": {"mode": "auto"}})
    first, second = (run_directory.choose_run_directory(config) for _ in range(2))
    assert first.path == second.path
    first, second = first.reserve(), second.reserve()
    assert [d.path.name for d in (first, second)] == ["0", "1"]
    first.create(config)
    with pytest.raises(ValueError, match="x"), second.given_back_on_failure():
        raise ValueError("x")
    assert [path.name for path in (tmp_path / "runs" / "x").iterdir()] == ["0"]


def test_data_that_hold_no_image(tiny, tmp_path):
    folder = compose("train", ["data=folder"]).data
    listed = compose("train", ["data=list"]).data
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    (tmp_path / "broken").mkdir()
    for i in range(200):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no picture")
    (tmp_path / "gone.txt").write_text("".join(f"{i}.png\n" for i in range(200)))
    cases = {
        "empty": (folder, "is an empty folder"),
        "text": (folder, "holds no image"),
        "broken": (folder, "no image can be read; for instance 0.png"),
        "gone.txt": (listed, "no image can be read; for instance 0.png"),
        "no_such": (folder, "there is no such folder"),
    }
    for name, (data, message) in cases.items():
        changes = {"data": data, "data.root": str(tmp_path / name)}
        line = refused(tiny, {**changes, "run.root": str(tmp_path / "runs")})
        assert f"data.root={tmp_path / name}" in line
        assert message in line
        assert not (tmp_path / "runs").exists()
    assert "data.root is not set" in refused(tiny, {"data": folder})


def test_an_output_directory_that_cannot_be(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(tmp_path / "file") in refused(tiny, {"run.dir": str(where)})
    # A superuser may write anywhere, so the system's answer is made up.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused(tiny, {"run.dir": str(tmp_path / "run")})
    assert f"{tmp_path} is not a writable directory" in line
    assert not (tmp_path / "run").exists()


class Evil:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def damaged_checkpoints(tmp_path):
    code = tmp_path / "code.ckpt"
    torch.save({"state_dict": Evil()}, code)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Evil()))
    whole = tmp_path / "whole.pth"
    torch.save({"pos_embed": torch.zeros(1, 200, 10)}, whole)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(whole.read_bytes()[:700])
    return [code, plain, whole, truncated, tmp_path / "missing.ckpt"]


def test_weights_to_start_from_that_are_none(tiny, tmp_path, capfd):
    for path in damaged_checkpoints(tmp_path):
        line = refused(tiny, {"init": str(path), "run.root": str(tmp_path / "runs")})
        assert path.name in line
        assert not (tmp_path / "runs").exists()
    assert "code from a checkpoint ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"embed_dim": 48}, "blocks.0.norm1.bias is [48] instead of [24]"),
        ({"depth": 1}, "blocks.1.norm1.weight is missing"),
        (
            {"patch_size": 4, "img_size": 28},
            "patch_embed.proj.weight is [24, 3, 4, 4] instead of [24, 3, 8, 8]",
        ),
    ],
)
def test_weights_to_start_from_that_are_another_model_s(tiny, tmp_path, model, message):
    ours = OmegaConf.to_container(tiny.model)
    path = tmp_path / "other.safetensors"
    save_file(VisionTransformer(**{**ours, **model}).state_dict(), path)
    line = refused(tiny, {"init": str(path), "run.root": str(tmp_path / "runs")})
    assert f"init={path}: weights of another architecture than model" in line
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_checkpoints_that_are_none(command, tmp_path):
    for path in damaged_checkpoints(tmp_path):
        where = tmp_path / "out"
        code, out, err = command("eval_lowshot", f"checkpoint={path}", f"run.dir={where}")
        assert code == 2
        assert path.name in one_line_of(err)
        assert "code from a checkpoint ran" not in out
        assert not where.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint must be given"),
        (["checkpoint=[a:x,a:y]"], "the name a is taken"),
        (["checkpoint=[a:]"], "write name:path"),
        (["checkpoint=[random:x]"], "taken"),
        (
            ["checkpoint=x", "baselines=[best]"],
            "baselines must be a list of random, pixels, majority, or auto, got ['best']",
        ),
        (["checkpoint=x", "protocol.features.feature=best"], "feature must be"),
        (["checkpoint=x", "logger=tensorboard"], "logger must be wandb"),
        (["checkpoint=x", "protocol.splits=0"], "protocol.splits must be in [1, 10000], got 0"),
        (["checkpoint=x", "protocol.logistic.lambd=0"], "lambd=0: must be > 0"),
        (["checkpoint=x", "seed={a:b}"], "seed must be a whole number"),
        (["checkpont=x"], "unknown key checkpont"),
        (["checkpoint=x", "model=vit_s16"], "model=vit_s16: no presets here, set model.num_heads"),
    ],
)
def test_wrong_settings_of_eval_lowshot(command, tmp_path, arguments, message):
    code, _, err = command("eval_lowshot", *arguments, f"run.dir={tmp_path / 'out'}")
    assert code == 2
    assert message in one_line_of(err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "plan=true", "planning.rate=1e12", "planning.images=100"],
        ["eval_lowshot", "checkpoint=no"],
        ["suggest_labels", "checkpoint=no", "budget=3"],
        ["show_views", "out=x.png"],
    ],
)
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("[]", "data._target_=[]: must name a class or a function to call"),
        ("no.such.thing", "data._target_=no.such.thing: "),
        ("builtins.dict", "data._target_=builtins.dict: does not make a MSNDataModule"),
    ],
)
def test_a_wrong_target_of_the_data_is_refused_by_all_commands(
    command, tmp_path, monkeypatch, arguments, target, message
):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*arguments, f"data._target_={target}")
    assert code == 2
    assert message in one_line_of(err)
    assert list(tmp_path.iterdir()) == []


class OwnData(MSNDataModule):
    """A user's own."""


def test_only_training_takes_data_of_ones_own(command, tmp_path):
    target = f"data._target_={__name__}.OwnData"
    code, _, err = command("eval_lowshot", "checkpoint=no", target)
    assert (code, "only training can use another one" in one_line_of(err)) == (2, True)
    code, out, err = command("train", *TINY, "trainer.limit_train_batches=1", target, "plan=true")
    assert (code, "backbone, parameters" in out) == (0, True), err


def test_verify_refuses_what_is_no_golden_file(command, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    (tmp_path / "x.json").write_text("{}")
    for path in (tmp_path / "x.safetensors", tmp_path / "y.safetensors"):
        code, _, err = command("verify", f"golden={path}")
        assert code == 2
        assert path.name in one_line_of(err)


@pytest.mark.parametrize("flush", [True, False])
def test_no_command_needs_a_reader(flush):
    done = []

    def job(config):
        print("nobody reads this", flush=flush)
        done.append(config)

    with no_reader():
        run_command("verify", job, [])
    assert done


@pytest.mark.parametrize("flush", [True, False])
def test_a_full_disk_under_the_output_is_a_line_that_says_so(capsys, flush):
    with (
        open("/dev/full", "w") as full,
        contextlib.redirect_stdout(full),
        pytest.raises(SystemExit) as ended,
    ):
        run_command("verify", lambda config: print("a figure", flush=flush), [])
    assert ended.value.code == 2
    assert one_line_of(capsys.readouterr().err) == "error: /dev/full: No space left on device"


@pytest.mark.parametrize("error", [None, MemoryError(), RuntimeError("a fault of ours")])
def test_too_little_memory_is_a_line_in_every_command(capsys, error):
    def job(config):
        if error is not None:
            raise error
        torch.empty(1 << 50)

    kind = RuntimeError if isinstance(error, RuntimeError) else SystemExit
    with pytest.raises(kind) as ended:
        run_command("verify", job, [])
    if kind is SystemExit:
        assert ended.value.code == 2
        assert "out of memory" in one_line_of(capsys.readouterr().err)


def test_ctrl_c_while_modules_are_imported_is_a_line(capsys, monkeypatch):
    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "msn.commands.entry", Interrupted())
    with pytest.raises(SystemExit) as ended:
        run_named("train", [])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    loaded = "import msn.__main__, sys; sys.exit('hydra' in sys.modules)"  # before it can be said
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0


@pytest.mark.parametrize("wrong", ["checkpoint=x", "nope=1"])
def test_what_the_command_line_tells_is_told_before_torch_is_loaded(wrong):
    code = f"""
import sys
from msn.__main__ import run_named
try:
    run_named("embed", ["{wrong}"])
finally:
    print("torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "False\n")
    assert ended.stderr.startswith(("error: out must be given", "error: unknown key nope"))
