"""`msn bench`: our own figures on this machine, rows kept where json= says, mistakes."""

import json

import pytest
import torch

from msn.commands.bench import combine
from msn.commands.entry import compose, to_plain
from msn.commands.step import TrainingStep, case_of, product_type
from tests.data.photos import make_folder
from tests.weights.zoo import save_hugging_face

TINY = ["experiment=digits", "model.depth=2", "batch_size=4", "rounds=1"]
DATA_PATH = ["decode", "worker", "batched_views_cpu"]


@pytest.mark.slow
def test_all_measures_step_and_data_path_and_names_the_bottleneck(command, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    root, file = make_folder(tmp_path / "in", classes=1, images=2), tmp_path / "rows.json"
    code, out, err = command("bench", *TINY, f"images={root}", f"json={file}")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert list(rows) == [*DATA_PATH, "msn", "matmul_limit", "training"]
    ours, limit = rows["msn"], rows["matmul_limit"]
    for row in (ours, limit):
        assert row["images_per_s"] == pytest.approx(4 / row["s_per_step"])
        flops = row["flops_per_s"] * row["s_per_step"]
        assert flops == pytest.approx(ours["flops_per_s"] * ours["s_per_step"])
        assert row["share_of_limit"] == pytest.approx(row["flops_per_s"] / limit["flops_per_s"])
        settings = [row[key] for key in ("chunk_size", "compile", "patch_drop")]
        assert settings == [None, "auto", 0.15]
    parts = ours["parts"]
    assert list(parts) == ["views", "target", "anchors", "loss", "backward", "optimiser", "ema"]
    assert min(parts.values()) > 0
    for name in DATA_PATH:
        assert rows[name]["images_per_s"] == pytest.approx(1000 / rows[name]["milliseconds"])
        assert name in out
    assert rows["batched_views_cpu"]["views_milliseconds"] > 0
    assert f"the bottleneck is {rows['training']['bottleneck']}" in " ".join(out.split())


def test_a_folder_with_an_image_that_cannot_be_read_is_refused(command, tmp_path):
    root = make_folder(tmp_path / "in", classes=1, images=2)
    (root / "class_0" / "0.jpg").write_bytes(b"")
    code, _, err = command("bench", "what=views", f"images={root}")
    assert code == 2
    assert "class_0/0.jpg cannot be read (empty file)" in err


def test_on_a_cpu_all_parts_share_the_cores():
    row = combine(worker=0.008, views=0.024, step=0.5, cores=4, on_cuda=False)
    assert row["images_per_s"] == pytest.approx(1 / (0.002 + 0.006 + 0.5))
    assert row["bottleneck"] == "step"
    assert row["limits"] == pytest.approx({"decoding": 500, "views": 1 / 0.006, "step": 2})


def on_cuda(**changes):
    return combine(**{"worker": 0.008, "views": 0.002, "on_cuda": True, **changes})


def test_on_cuda_decoding_goes_on_beside_the_device():
    row = on_cuda(step=0.0005, cores=2)
    assert row["images_per_s"] == pytest.approx(1 / 0.004)
    assert row["bottleneck"] == "decoding"
    assert on_cuda(step=0.003, cores=16)["images_per_s"] == pytest.approx(200)


def test_views_can_be_the_bottleneck():
    assert on_cuda(step=0.0005, cores=64)["bottleneck"] == "views"


def test_the_step_of_an_adaptation_is_the_file_s(command, tmp_path, monkeypatch):
    save_hugging_face(tmp_path / "found", "dinov3_vit")
    cases = []
    monkeypatch.setattr("msn.commands.bench.bench_step", lambda s, _: cases.append(case_of(s)))
    code, out, err = command("bench", "what=step", "experiment=adapt", f"init={tmp_path / 'found'}")
    assert code == 0, err
    assert "img_size 32, patch_size 8" in out
    assert "1024 prototypes" in out
    model, method = cases[0].model, cases[0].method
    assert (model["position"], model["embed_dim"]) == ("rope", 24)
    assert (method["num_prototypes"], method["trunk_lr_scale"]) == (1024, 0.1)
    assert cases[0].views["rand_size"] == 32


@pytest.mark.parametrize(
    ("precision", "weights", "views"),
    [
        ("64-true", torch.float64, torch.float64),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("32-true", torch.float32, torch.float32),
    ],
)
def test_a_step_is_measured_in_its_precision(precision, weights, views):
    changed = f"trainer.precision={precision}"
    method = TrainingStep(case_of(to_plain(compose("bench", ["what=step", *TINY, changed]))))
    method.step()
    method.parts()
    assert {view.dtype for view in method.views[:3]} == {views}
    assert {view.dtype for view in method.make_views()[:3]} == {views}
    parameters = list(method.module.network.parameters())
    assert {p.dtype for p in parameters} == {weights}
    assert product_type(precision) == views  # of the matrix rate beside it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch_size=1"], "batch_size must be a whole number >= 2"),
        (["rounds=0"], "rounds must be a whole number >= 1"),
        (["against=[lightly]"], "unknown key against"),
        (["chunk_size=abc"], "chunk_size must be a whole number >= 1, got 'abc'"),
        (["chunk_size=0"], "chunk_size must be a whole number >= 1, got 0"),
        (["compile=perhaps"], "compile must be true, false or auto"),
        (["rounds=abc"], "rounds must be a whole number >= 1, got 'abc'"),
        (["data.views.rand_views=abc"], "data.views.rand_views must be a whole number"),
        (["trainer.precision=8-true"], "trainer.precision must be in"),
        (["data.views.rand_views=-1"], "rand_views=-1"),
        (["experiment=nope"], "nope"),
        (["experiment=adapt"], "model.img_size is null: give init=PATH"),
        (["experiment=adapt", "model=vit_digits"], "method.num_prototypes is null: give init=PATH"),
    ],
)
def test_mistakes_of_a_step_end_in_one_line(command, arguments, message):
    code, _, err = command("bench", "what=step", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["what=nope"], "allowed are all, step, views"),
        (["what=views", "batch_size=4"], "unknown key batch_size"),
        (["what=views", "+batch_size=4"], "unknown key batch_size"),
        (["what=views", "images=/no/such"], "/no/such"),
        (["json=/no/such/rows.json"], "json=/no/such/rows.json"),
        (["what=views", "model=nope"], "allowed are"),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, message):
    code, _, err = command("bench", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
