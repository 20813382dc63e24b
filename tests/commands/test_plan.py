"""`python train.py plan=true`: costs are told, nothing is written."""

import pytest


def test_a_plan_says_what_a_training_costs_and_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(
        *("train", "plan=true", "experiment=msn_vits16", "planning.rate=4e14"),
        *("planning.memory=12", "trainer.accelerator=cpu", "trainer.precision=bf16-mixed"),
    )
    assert code == 0
    words = " ".join(out.split())
    assert "800 epochs of 1,281,167 images" in words
    assert "21.67 M" in words  # timm's vit_small_patch16_224 without classifier
    assert "81.2" in words  # GFLOP an image, the formula's
    # 800 epochs x 1,281,167 images x 81.2 GFLOP / 400 TFLOP/s
    assert "57.8" in words
    assert "chunk_size=64" in words or "chunk_size=128" in words
    assert list(tmp_path.iterdir()) == []


def test_a_short_measurement_stands_in_for_a_stated_rate(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("train", "plan=true", "model.depth=2", "trainer.max_epochs=2")
    assert code == 0
    assert "measured with 8 images" in " ".join(out.split())
    assert "2 epochs of 1,280 images" in " ".join(out.split())
    assert "chunk_size=null is fastest" in " ".join(out.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.depth=0"], "model.depth must be a whole number >= 1"),
        (["trainer.devices=3", "planning.rate=1e12"], "not divisible by 3 processes"),
        (["compile=perhaps"], "compile must be true, false or auto"),
        (["planning.speed=1"], "unknown key planning.speed"),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, message):
    code, _, err = command("train", "plan=true", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
