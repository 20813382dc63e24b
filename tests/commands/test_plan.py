"""`python train.py plan=true`: costs are told, nothing is written."""

import io

import pytest
import torch
from rich.console import Console

from msn.commands import plan
from msn.commands.entry import compose, to_plain
from msn.commands.plan_settings import count_processes
from msn.commands.step import Case, TrainingStep
from msn.errors import UserError
from msn.training.cost import Flops, Memory


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
    assert "81.2" in words  # GFLOP per image, the formula's
    # 800 epochs x 1,281,167 images x 81.2 GFLOP / 400 TFLOP/s
    assert "57.8" in words
    assert "chunk_size=64 " in words  # 8.6 GB; 128 images would take 15
    assert list(tmp_path.iterdir()) == []


def planned(*arguments):
    """The plan, and what it printed, on one line."""
    config = compose("train", ["plan=true", "planning.rate=1e12", *arguments])
    shown = io.StringIO()
    numbers = plan.run(config, to_plain(config), Console(file=shown, width=120))
    return numbers, " ".join(shown.getvalue().split())


def test_a_plan_for_a_gpu_is_that_of_a_gpu_also_where_there_is_none():
    """ViT-B/16 with 1,024 images on 12 GB: what docs/performance.md promises."""
    gpu, words = planned("experiment=msn_vitb16", "trainer.accelerator=gpu", "planning.memory=12")
    assert (gpu.case.device, gpu.case.precision) == ("cuda", "bf16-mixed")
    assert "chunk_size=32 " in words


def test_a_gpu_that_is_not_here_cannot_be_measured(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = command("train", "plan=true", "trainer.accelerator=gpu")
    assert (code, "planning.rate must be given" in err) == (2, True)
    assert "planning.memory=GiB" in planned("trainer.accelerator=gpu")[1]


def test_several_processes_divide_the_batch_and_under_fsdp2_the_network():
    digits = ("trainer.accelerator=cpu", "trainer.precision=32-true")
    one, ddp, fsdp2 = (
        planned(*digits, f"trainer.devices={count}", f"trainer.strategy={strategy}")
        for count, strategy in ((1, "fsdp2"), (4, "auto"), (4, "fsdp2"))
    )
    assert [numbers.case.batch_size for numbers, _ in (one, ddp, fsdp2)] == [64, 16, 16]
    memory = [numbers.memory for numbers, _ in (one, ddp, fsdp2)]
    assert memory[1].weights == memory[0].weights
    assert memory[1].gradients == memory[0].gradients  # they lie in DDP's buckets
    assert memory[2].optimiser == memory[0].optimiser / 4
    assert "sharded over them" in fsdp2[1]
    assert "sharded over them" not in one[1] + ddp[1]


def test_limited_steps_make_a_shorter_epoch():
    whole, limited = planned()[0], planned("trainer.limit_train_batches=3")[0]
    assert (whole.images, limited.images) == (1280, 3 * 64)
    assert limited.hours(1e12) == pytest.approx(whole.hours(1e12) * 192 / 1280)
    assert planned("trainer.limit_train_batches=1000")[0].images == 1280
    config = compose("train", [])
    assert plan.count_images(config, to_plain(config), all_=True) == 1297  # that prototypes follow


def case_of(batch_size):
    return Case({}, {}, {}, batch_size, None, False, "32-true", "cpu")


def forecast(case):
    return Memory(0, 0, 0, 0, 0, 0, peak=10.0 * case.batch_size)


@pytest.mark.parametrize(
    ("batch_size", "room", "measured"), [(64, 1000, 8), (64, 45, 4), (64, 20, 2), (1, 1000, 2)]
)
def test_as_many_images_are_measured_as_fit(monkeypatch, batch_size, room, measured):
    monkeypatch.setattr(plan, "measure_matrix_rate", lambda device, dtype: 1e12)
    monkeypatch.setattr(plan, "_seconds_per_step", lambda case, device: case.batch_size / 5)
    flops = Flops(1.0, 1.0, 1.0)
    rate, images = plan.measure_rate(case_of(batch_size), flops, forecast, room)
    assert images == measured
    assert rate == pytest.approx(5 * flops.total)


def test_where_no_batch_fits_nothing_is_measured():
    with pytest.raises(UserError, match="planning.rate="):
        plan.measure_rate(case_of(64), Flops(1.0, 1.0, 1.0), forecast, room=19)


def test_measured_steps_that_run_out_of_memory_leave_the_memory_table_and_a_line(
    command, monkeypatch
):
    def step(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingStep, "step", step)
    code, out, err = command("train", "plan=true", "model.depth=2")
    assert code == 2
    assert "peak, GiB" in out
    assert "chunk_size=null is fastest" in " ".join(out.split())
    assert err.strip().startswith("error: out of memory in measured steps of 8 images")
    assert "planning.rate=" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("devices", "processes"), [("auto", 3), (-1, 3), ("-1", 3), (2, 2), ([0, 1], 2), ("0,1,5", 3)]
)
def test_devices_are_counted_as_lightning_counts_them(monkeypatch, devices, processes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    trainer = {"devices": devices, "num_nodes": 2}
    assert count_processes(trainer, torch.device("cuda")) == 2 * processes


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
        (["planning.rate=0"], "planning.rate must be > 0, got 0"),
        (["planning.rate=-1"], "planning.rate must be > 0, got -1"),
        (["planning.rate=fast"], "planning.rate must be a finite number or null, got 'fast'"),
        (["planning.memory=big"], "planning.memory must be a finite number or null, got 'big'"),
        (["planning.images=many"], "planning.images must be a whole number or null, got 'many'"),
        (["planning=null"], "planning must be a group of keys"),
        (["trainer.devices=0"], "trainer.devices=0: must be auto, -1 (all)"),
        (["trainer.devices=abc"], "trainer.devices=abc: must be auto, -1 (all)"),
        (["trainer.devices=true"], "trainer.devices must be a whole number or text"),
        (["trainer.devices=[]"], "trainer.devices=[]: must be auto, -1 (all)"),
        (
            ["trainer.devices=-1", "trainer.accelerator=cpu"],
            "trainer.devices=-1: on the CPU it must be auto or a whole number >= 1",
        ),
        (["trainer.max_epochs=many"], "trainer.max_epochs must be a whole number"),
        (["trainer.limit_train_batches=0"], "trainer.limit_train_batches must be > 0"),
        (["data.global_batch_size=x"], "data.global_batch_size must be a whole number >= 1"),
        (["data.global_batch_size=1"], "data.global_batch_size=1: BatchNorm"),
        (["model.mlp_ratio=1e30"], "model or method: too large"),
        (["data.views.patch_size=4"], "data.views.patch_size=4: must be model.patch_size=8"),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, message):
    code, _, err = command("train", "plan=true", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
