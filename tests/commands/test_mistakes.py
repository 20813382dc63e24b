"""Bad input ends in one clear line and exit code 2, and leaves nothing behind."""

import pickle

import pytest
import torch

from tests.commands.conftest import TINY

TRAIN = {
    "mistyped key": (["trainer.max_epoch=3"], "unknown key trainer.max_epoch: allowed are"),
    "mistyped group": (["data=digit"], "allowed are"),
    "added key": (["+typo=1"], "unknown key typo: allowed are"),
    "added method key": (["+method.typo=1"], "unknown key method.typo: allowed are"),
    "added trainer key": (["+trainer.typo=1"], "unknown key trainer.typo: allowed are"),
    "text for a number": (["method.lr=abc"], "method.lr must be a number, got 'abc'"),
    "text for epochs": (["trainer.max_epochs=abc"], "trainer.max_epochs must be a whole number"),
    "no epochs": (["trainer.max_epochs=0"], "trainer.max_epochs must be >= 1"),
    "syntax": (["trainer.max_epochs=["], ""),
    "patch does not divide": (["model.img_size=30"], "multiple of the patch size 8"),
    "view size": (["data.views.rand_size=30"], "multiple of the patch size 8"),
    "patch_drop": (["method.patch_drop=1.0"], "method.patch_drop must be in [0, 1), got 1.0"),
    "scope": (["method.patch_drop_scope=x"], "must be one of batch, image"),
    "warm-up": (["method.warmup_epochs=500"], "does not fit a training of 1 epochs"),
    "batch": (["data.global_batch_size=2000"], "larger than the training set"),
    "processes": (["data.global_batch_size=127", "trainer.devices=2"], "divisible"),
    "shots": (["protocol.shots=[1,500]"], "images to label"),
    "accumulation": (["trainer.accumulate_grad_batches=2"], "chunk_size=N"),
    "precision": (["trainer.precision=8"], "trainer.precision must be"),
    "seed": (["seed=-1"], "seed must be a whole number"),
    "missing root": (["data=folder"], "data.root"),
    "absent root": (["data=folder", "data.root=/no/such/dir"], "/no/such/dir"),
    "init": (["init=/no/such/file"], "/no/such/file"),
}


def one_line(err):
    lines = [line for line in err.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("case", TRAIN)
def test_wrong_settings_of_train(command, tmp_path, case):
    arguments, message = TRAIN[case]
    code, _, err = command("train", *TINY, f"run.root={tmp_path / 'runs'}", *arguments)
    assert code == 2
    assert message in one_line(err)
    assert not (tmp_path / "runs").exists()


def test_a_directory_without_images(command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    for name in ("empty", "text"):
        root = tmp_path / name
        where = [f"data.root={root}", f"run.dir={root}x"]
        code, _, err = command("train", *TINY, "data=folder", *where)
        assert code == 2
        assert str(root) in one_line(err)
        assert not (tmp_path / f"{name}x").exists()


def test_an_output_directory_that_cannot_be(command, tmp_path):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "run"):
        code, _, err = command("train", *TINY, f"run.dir={where}")
        assert code == 2
        assert str(tmp_path / "file") in one_line(err)


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


def test_checkpoints_that_are_none(command, tmp_path):
    for path in damaged_checkpoints(tmp_path):
        where = tmp_path / "out"
        code, out, err = command("eval_lowshot", f"checkpoint={path}", f"run.dir={where}")
        assert code == 2
        assert path.name in one_line(err)
        assert "code from a checkpoint ran" not in out
        assert not where.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint must be given"),
        (["checkpoint=[a:x,a:y]"], "the name a is taken"),
        (["checkpoint=[a:]"], "write name:path"),
        (["checkpoint=[random:x]"], "taken"),
        (["checkpoint=x", "baselines=[best]"], "baselines must be among"),
        (["checkpoint=x", "protocol.features.feature=best"], "feature must be"),
        (["checkpoint=x", "logger=tensorboard"], "logger must be wandb"),
        (["checkpoint=x", "protocol.splits=0"], "protocol.splits must be >= 1"),
        (["checkpoint=x", "protocol.logistic.lambd=0"], "lambd must be > 0"),
        (["checkpont=x"], "unknown key checkpont"),
    ],
)
def test_wrong_settings_of_eval_lowshot(command, tmp_path, arguments, message):
    code, _, err = command("eval_lowshot", *arguments, f"run.dir={tmp_path / 'out'}")
    assert code == 2
    assert message in one_line(err)
    assert not (tmp_path / "out").exists()


def test_verify_refuses_what_is_no_golden_file(command, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    (tmp_path / "x.json").write_text("{}")
    for path in (tmp_path / "x.safetensors", tmp_path / "y.safetensors"):
        code, _, err = command("verify", f"golden={path}")
        assert code == 2
        assert path.name in one_line(err)
